"""A resumed run equals the unbroken one bit for bit, wherever its checkpoint was asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.checkpoint import rotation

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

NUM_SAMPLES, ACCUMULATION, TOTAL = 28, 2, 22
"""Samples, micro-batches of a step, and micro-batches of a run: three epochs of seven and a bit."""
Place = Callable[[str, int], None]
"""Called by the script with where it is, and how many micro-batches it has trained with."""


class Net(nn.Module):
    """Draws random numbers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = F.dropout(torch.tanh(block(x)), 0.3, self.training)
        return self.head(x)


class Counter:
    """Something that a script counts by itself."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Run:
    """One run of a training script, and all that it did and left."""

    def __init__(self, stage: int, dtype: str, schedule: str, seed: int = 0, **checkpoint: Any) -> None:
        self.engine = distui.Engine(
            strategy={"zero_stage": stage},
            precision={"dtype": dtype, "initial_loss_scale": 2.0**17, "loss_scale_window": 3},
            batch={"micro_size": 4 // torch.distributed.get_world_size() if torch.distributed.is_initialized() else 4,
                   "accumulation": ACCUMULATION},
            checkpoint=checkpoint,
        )  # fmt: skip
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        x = torch.randn(NUM_SAMPLES, 7, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(x, x.abs().argmax(1) % 3), batch_size=4, shuffle=True)
        self.model, self.optimizer, self.loader = self.engine.prepare(model, optimizer, loader)
        plain = torch.optim.lr_scheduler.StepLR if schedule == "epoch" else torch.optim.lr_scheduler.ExponentialLR
        self.schedule, self.counter = schedule, Counter()
        self.scheduler: Any = plain(self.optimizer, *((1, 0.7) if schedule == "epoch" else (0.9,)))
        if schedule == "prepared":
            self.scheduler = self.engine.prepare(self.scheduler)
        else:  # stepped by hand
            self.engine.register_for_checkpointing(self.scheduler)
        self.engine.register_for_checkpointing(self.counter)
        self.trace: list[tuple[float, ...]] = []

    def train(self, until: int = TOTAL, place: Place = lambda name, done: None) -> None:
        """Train until so many micro-batches are done."""
        engine = self.engine
        while True:
            for x, y in self.loader:
                if self.counter.value == until:
                    return
                place("top", self.counter.value)
                with engine.accumulate(self.model):
                    place("in accumulate", self.counter.value)
                    loss = F.cross_entropy(self.model(x), y)
                    engine.backward(loss)
                    place("before step", self.counter.value)
                    engine.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    stepped = engine.sync_gradients and not engine.optimizer_step_was_skipped
                    if self.schedule == "prepared" or (self.schedule == "hand" and stepped):
                        self.scheduler.step()
                    self.optimizer.zero_grad()
                    self.counter.value += 1
                    place("end of accumulate" if engine.sync_gradients else "within a step", self.counter.value)
                scale = engine.scaler.scale if engine.scaler is not None else 1.0
                self.trace.append((loss.item(), self.scheduler.get_last_lr()[0], scale, float(engine.clock.step)))
                place("end", self.counter.value)
            if self.schedule == "epoch":
                self.scheduler.step()

    def left(self) -> dict[str, Any]:
        """Return all that a run leaves, as it can be compared."""
        states = self.optimizer.state_dict()
        moments = {(i, k): v.clone() for i, s in states["state"].items() for k, v in s.items() if torch.is_tensor(v)}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in states["param_groups"]]
        return {
            "weights": {name: value.clone() for name, value in self.engine.get_state_dict(self.model).items()},
            "moments": moments,
            "groups": groups,
            "schedule": self.scheduler.state_dict(),
            "scaler": self.engine.scaler.state_dict() if self.engine.scaler is not None else None,
            "drawn": (torch.rand(1).item(), random.random(), float(np.random.rand())),
        }


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    wrong = [key for key in ("groups", "schedule", "scaler", "drawn") if one[key] != other[key]]
    for key in ("weights", "moments"):
        wrong += [f"keys of {key}"] if one[key].keys() != other[key].keys() else []
        wrong += [f"{key} {name}" for name, value in one[key].items() if not torch.equal(value, other[key][name])]
    return wrong


def _resumed(path: str, *options: Any, name: str | None = None) -> Run:
    """Return a run that goes on from a checkpoint in `path`, or from the newest there."""
    run = Run(options[0], options[1], options[2], seed=99)
    run.engine.load_state(str(Path(path) / name) if name else str(rotation.checkpoints(Path(path))[-1]))
    return run


BY_HAND = ("top", "in accumulate", "end of accumulate", "end")


def _every_trigger(folder: str, *options: Any) -> list[str]:
    """Return what differs between a resumed and the unbroken run, for every kind of trigger."""
    whole = Run(*options)
    whole.train()
    expected, wrong = whole.left(), []

    def check(what: str, resumed: Run) -> None:
        resumed.train()
        tail = whole.trace[len(whole.trace) - len(resumed.trace) :]
        if not resumed.trace or resumed.trace != tail:
            wrong.append(f"{what}: trace {resumed.trace} is not {tail}")
        wrong.extend(f"{what}: {name}" for name in _differences(resumed.left(), expected))

    for every in (3, 4):  # within an epoch, and at the end of one, which has four steps
        broken = Run(*options, dir=f"{folder}/every{every}", every_steps=every, async_save=every == 3)
        broken.train(until=every * ACCUMULATION + 4)
        broken.engine.saver.join()  # what the script waits for when it is killed here: nothing
        check(f"every {every} steps", _resumed(f"{folder}/every{every}", *options))
    asked: list[Any] = []
    broken = Run(*options, dir=f"{folder}/asked")

    def ask(name: str, done: int) -> None:
        # As the control bus does, from within the optimizer's step.
        if name == "before step" and done == 8:
            own = broken.optimizer.after_step

            def after_step(optimizer: Any) -> None:
                own(optimizer)
                broken.engine.step_end.ask(lambda path, error: asked.append((path.name, error)))
                broken.optimizer.after_step = own

            broken.optimizer.after_step = after_step

    broken.train(until=12, place=ask)
    broken.engine.saver.join()
    assert asked == [("step_00000005", None)]
    check("a command", _resumed(f"{folder}/asked", *options))
    for index, place in enumerate(BY_HAND):
        broken = Run(*options)

        def save(name: str, done: int, place: str = place, index: int = index, broken: Run = broken) -> None:
            if name == place and done == 9:
                broken.engine.save_state(f"{folder}/hand{index}", asynchronous=bool(index % 2))

        broken.train(until=12, place=save)
        broken.engine.saver.join()
        check(f"by hand at {place}", _resumed(folder, *options, name=f"hand{index}"))
    return wrong


@pytest.mark.parametrize("schedule", ["prepared", "hand", "epoch"])
@pytest.mark.parametrize(
    ("world", "stage", "dtype"), [(1, 0, "fp16"), (1, 3, "fp32"), (2, 0, "fp32"), (2, 3, "fp16"), (2, 2, "bf16")]
)
def test_a_resumed_run_equals_the_unbroken_one(
    run_ranks: RunRanks, tmp_path: Path, world: int, stage: int, dtype: str, schedule: str
) -> None:
    for wrong in run_ranks(_every_trigger, world, str(tmp_path), stage, dtype, schedule, timeout_s=120):
        assert not wrong, "\n".join(wrong)
