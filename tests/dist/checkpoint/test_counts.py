"""Parameters of one unit that were stepped unequally often, or never, go on with counts of their own after a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

DIM = 12
Job = tuple[distui.Engine, Any, Any]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.idle = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.late(torch.tanh(self.early(x)))


def _job(settings: dict[str, Any], late: bool = True) -> Job:
    """Return what is trained; without `late` those parameters are frozen when it is prepared."""
    engine = distui.Engine(**settings)
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block() for _ in range(3)))
    for block in model:
        block.late.requires_grad_(late)
    return engine, *engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))


def _steps(job: Job, first: int, last: int) -> None:
    engine, model, optimizer = job
    for step in range(first, last):
        for block in model:
            block.late.requires_grad_(step not in (1, 2))
        x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(step))
        engine.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def _resumed_and_unbroken(path: str, settings: dict[str, Any]) -> None:
    job = _job(settings)
    _steps(job, 0, 4)
    job[0].save_state(path)
    _steps(job, 4, 7)
    unbroken = job[0].get_state_dict(job[1])
    job[0].end_training()

    other = _job(settings)
    other[0].load_state(path)
    _steps(other, 4, 7)
    resumed = other[0].get_state_dict(other[1])
    for name, value in resumed.items():
        assert torch.equal(value, unbroken[name]), f"{name}: {(value - unbroken[name]).abs().max():.2e}"
    other[0].load_state(path)  # into one that has counted apart already
    _steps(other, 4, 7)
    for name, value in other[0].get_state_dict(other[1]).items():
        assert torch.equal(value, resumed[name]), name
    other[0].end_training()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")]
)
def test_a_resumed_run_counts_steps_as_the_unbroken_one(
    run_ranks: RunRanks, tmp_path: Any, stage: int, offload: str, precision: str
) -> None:
    settings = {
        "strategy": {"zero_stage": stage},
        "offload": {"optimizer": offload},
        "precision": {"dtype": precision},
    }
    run_ranks(_resumed_and_unbroken, 2, str(tmp_path / "ckpt"), settings)


def _unfrozen_in_time(path: str, settings: dict[str, Any]) -> None:
    """`late` is frozen whenever a script begins, and its moments are in the checkpoint all the same."""
    job = _job(settings, late=False)
    _steps(job, 1, 5)
    job[0].save_state(path)
    _steps(job, 5, 8)
    unbroken = job[0].get_state_dict(job[1])
    job[0].end_training()

    other = _job(settings, late=False)
    other[0].load_state(path)
    other[0].save_state(f"{path}-again")  # before anything is unfrozen
    _steps(other, 5, 8)
    for name, value in other[0].get_state_dict(other[1]).items():
        assert torch.equal(value, unbroken[name]), f"{name}: {(value - unbroken[name]).abs().max():.2e}"
    other[0].load_state(f"{path}-again")
    _steps(other, 5, 8)
    for name, value in other[0].get_state_dict(other[1]).items():
        assert torch.equal(value, unbroken[name]), f"saved again, {name}"
    other[0].end_training()


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_what_is_frozen_at_the_load_keeps_its_moments(
    run_ranks: RunRanks, tmp_path: Any, stage: int, precision: str
) -> None:
    settings = {"strategy": {"zero_stage": stage}, "precision": {"dtype": precision}}
    run_ranks(_unfrozen_in_time, 2, str(tmp_path / "ckpt"), settings)


def _frozen_for_good(path: str, settings: dict[str, Any]) -> None:
    """States that cannot come later are left out, as long as nobody unfreezes their parameters."""
    job = _job(settings)
    _steps(job, 0, 4)
    job[0].save_state(path)
    job[0].end_training()
    other = _job(settings, late=False)
    other[0].load_state(path)
    other[0].end_training()


def test_states_that_cannot_grow_are_left_out(run_ranks: RunRanks, tmp_path: Any) -> None:
    settings = {"strategy": {"zero_stage": 2}, "offload": {"optimizer": "cpu"}}
    run_ranks(_frozen_for_good, 2, str(tmp_path / "ckpt"), settings)
