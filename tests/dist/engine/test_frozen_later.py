"""Parameters that a script freezes in mid-run count in no norm any more: against plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

FROZEN = ("0.weight", "2.bias")


def _norms(engine: distui.Engine | None) -> list[float]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    x_BD = torch.randn(8, 6)
    num_ranks, rank = 1, 0
    if engine is not None:
        model, optimizer = engine.prepare(model, optimizer)
        num_ranks, rank = engine.num_processes, engine.process_index
    norms = []
    for step in range(4):
        if step == 2:
            for name, param in model.named_parameters():
                param.requires_grad_(name not in FROZEN)
        loss = model(x_BD.chunk(num_ranks)[rank]).square().mean() * 100
        if engine is None:
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        else:
            engine.backward(loss)
            norm = engine.clip_grad_norm_(model.parameters(), 1.0)
            assert norm is not None
            norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def _with_engine(stages: list[int]) -> list[list[float]]:
    found = []
    for stage in stages:
        engine = distui.Engine(strategy={"zero_stage": stage})
        found.append(_norms(engine))
        engine.free_memory()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_norm_is_of_what_has_a_gradient_in_this_step(run_ranks: RunRanks, num_ranks: int) -> None:
    expected = _norms(None)
    for found in run_ranks(_with_engine, num_ranks, [0, 1, 2, 3]):
        assert all(norms == pytest.approx(expected, rel=1e-5) for norms in found)
