"""A call of one rank alone that all must make is an error there, not a wait without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from distui import Engine
from distui.core.errors import UserError
from distui.core.ranks import meeting

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _one_alone(stage: int) -> None:
    engine = Engine(strategy={"zero_stage": stage})
    layer = torch.nn.Linear(3, 3)
    model, optimizer = engine.prepare(layer, torch.optim.AdamW(layer.parameters()))
    engine.backward(model(torch.ones(2, 3)).sum())
    optimizer.step()
    before, meeting.WITHIN_S = meeting.WITHIN_S, 0.2
    try:
        if engine.is_main_process:
            with pytest.raises(UserError, match=r"AdamW.state_dict\(\), which ranks 1 did not within 0.2 s"):
                optimizer.state_dict()
    finally:
        meeting.WITHIN_S = before
    dist.barrier()
    for _ in range(2):  # all come, the rank that came alone too
        assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (3, 3)


def test_states_that_one_rank_asks_for_alone(run_ranks: RunRanks) -> None:
    for stage in (1, 3):
        run_ranks(_one_alone, 2, stage)
