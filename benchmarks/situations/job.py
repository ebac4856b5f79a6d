"""A small training that something happens to, and the register of what may happen."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distui.core.paths import RunFolder
from distui.core.telemetry.source import TelemetrySource

FAULT_STEP = 60
STEP_S = 0.02
CULPRIT = 1
WORLD = 3


class Job:
    """What a situation gets: who this is, and what it can break."""

    def __init__(self, run: RunFolder, rank: int, world: int, source: TelemetrySource, num_elements: int) -> None:
        self.run, self.rank, self.world, self.source = run, rank, world, source
        self.is_culprit = rank == CULPRIT
        self.step = 0
        self.step_s = STEP_S
        self.data_s = 0.0
        self.loss: Callable[[int], float] = lambda step: 1.0
        self.learning_rate: Callable[[int], float | None] = lambda step: None
        self.skipped = False
        self.num_reduces = 1
        self.tensor = torch.ones(num_elements)
        self.first, self.second = dist.new_group(), dist.new_group()
        self.batches: Iterator[Any] = itertools.repeat(None)
        self.forward: Callable[[], None] = lambda: time.sleep(self.step_s)
        self.kept: list[Any] = []

    def told(self) -> None:
        """Say when it happened."""
        path = self.run.path / "fault"
        path.with_suffix(".new").write_text(str(time.time()))
        path.with_suffix(".new").rename(path)

    def train_step(self) -> None:
        """Do what a training step does, and tell of it."""
        began = time.perf_counter()
        self.source.phase("data")
        next(self.batches)
        time.sleep(self.data_s)
        data_s = time.perf_counter() - began
        self.source.phase("forward")
        self.forward()
        forward_s = time.perf_counter() - began - data_s
        self.source.phase("backward")
        for _ in range(self.num_reduces):
            dist.all_reduce(self.tensor)
        self.tensor.fill_(1.0)
        step_s = time.perf_counter() - began
        self.step += 1
        self.source.step(
            step=self.step,
            step_s=step_s,
            loss=self.loss(self.step),
            learning_rate=self.learning_rate(self.step),
            tokens=64,
            data_wait_s=data_s,
            forward_s=forward_s,
            exposed_comm_s=step_s - forward_s - data_s,
            skipped=self.skipped,
        )
        self.source.phase("idle")


@dataclass(frozen=True, slots=True)
class Situation:
    """What happens at `FAULT_STEP`, and what is right to say of it."""

    act: Callable[[Job], None]
    kind: str
    """The verdict; "" where none is right."""
    ranks: tuple[int, ...]
    goal_s: float
    """Until the verdict; or for how long there must be none."""
    world: int = WORLD
    needs_root: bool = False
    before: Callable[[Job], None] | None = None
    """Called on every rank before its first step."""
    num_elements: int = 1 << 10
    skip: str = ""
    """Why it cannot be had everywhere."""


SITUATIONS: dict[str, Situation] = {}

Act = Callable[[Job], None]


def sick(kind: str, *ranks: int, within_s: float = 6.0, **more: Any) -> Callable[[Act], Act]:
    """Register what must be told as `kind`, of `ranks`."""

    def add(act: Act) -> Act:
        SITUATIONS[act.__name__] = Situation(act, kind, ranks, within_s, **more)
        return act

    return add


def healthy(*, for_s: float, **more: Any) -> Callable[[Act], Act]:
    """Register what nothing must be said of for so long."""

    def add(act: Act) -> Act:
        SITUATIONS[act.__name__] = Situation(act, "", (), for_s, **more)
        return act

    return add


def at_work(seconds: float) -> None:
    """Use a processor for so long, and stand back for the other jobs of this machine."""
    os.nice(5)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(20_000))
