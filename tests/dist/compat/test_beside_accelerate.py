"""The real Accelerate beside the face: asked for state, rank, device or seed, both say the same."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs Accelerate installed")


def _asked(order: str) -> list[Any]:
    from distui.compat.accelerate import Accelerator, beside, state

    state.GradientState._reset_state()
    state.AcceleratorState._reset_state(True)
    real = importlib.import_module("accelerate.state")
    utils = importlib.import_module("accelerate.utils")
    if order == "real first":
        real.PartialState()
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
    if order == "face first":
        beside.agree()  # what the import of Accelerate does in a launched rank
    whole = real.AcceleratorState()  # raised where no Accelerator of its own was made
    assert real.is_initialized()
    for name in ("num_processes", "process_index", "local_process_index", "device", "is_last_process"):
        for other in (whole, real.PartialState(), accelerator.state):
            assert getattr(other, name) == getattr(accelerator, name), name
    assert whole.mixed_precision == accelerator.mixed_precision == "bf16"
    assert whole.distributed_type == accelerator.distributed_type == "MULTI_CPU"
    data: Any = list(torch.ones(12, 2))
    model, loader = accelerator.prepare(nn.Linear(2, 1), torch.utils.data.DataLoader(data))
    syncs = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
        told = real.GradientState()
        assert told.end_of_dataloader == accelerator.gradient_state.end_of_dataloader
        assert told.remainder == accelerator.gradient_state.remainder
        assert told.num_steps == 2
        syncs.append(told.sync_gradients)
    assert not real.GradientState().in_dataloader
    drawn = []
    for seed in (utils.set_seed, importlib.import_module("distui.compat.accelerate.utils").set_seed):
        seed(3, device_specific=True)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1]
    gathered = utils.gather_object([accelerator.process_index])
    accelerator.free_memory()
    state.AcceleratorState._reset_state(True)
    assert not real.is_initialized()
    return [syncs, gathered, drawn[0]]


@pytest.mark.parametrize("order", ["real first", "face first"])
def test_both_say_the_same(order: str, run_ranks: RunRanks) -> None:
    first, second = run_ranks(_asked, 2, order)
    assert first[0] == [False, True, False, True, False, True]
    assert first[1] == second[1] == [0, 1]
    assert first[2] != second[2]
