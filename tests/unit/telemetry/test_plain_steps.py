"""Steps of scripts without an engine: the first optimizer is the clock, and imports stay as they are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import torch
from torch import nn

import distui
from distui.core.telemetry import plain_steps
from distui.core.telemetry.source import TelemetrySource


class Recorder:
    """What a source is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.memories: list[dict[str, int]] = []
        self.started: list[tuple[Any, ...]] = []
        self.own_strategy = False
        self.phases: list[str] = []

    def step(self, **fields: Any) -> None:
        self.steps.append(fields)

    def memory(self, by_category_bytes: dict[str, int], **_: int) -> None:
        self.memories.append(by_category_bytes)

    def rank_started(self, *fields: Any, own_strategy: bool) -> None:
        self.started.append(fields)
        self.own_strategy = own_strategy

    def phase(self, name: str) -> None:
        self.phases.append(name)


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_the_first_optimizer_is_the_clock_until_an_engine_is_there() -> None:
    told = Recorder()
    plain_steps.watch_optimizers(cast(TelemetrySource, told))
    try:
        first = torch.optim.AdamW(nn.Linear(8, 4).parameters(), lr=0.5)
        second = torch.optim.SGD(nn.Linear(8, 4).parameters(), lr=0.1)
        for _ in range(3):
            _step(first)
            _step(second)
        assert [step["step"] for step in told.steps] == [1, 2, 3]
        assert told.steps[0]["step_s"] == 0.0 < told.steps[1]["optimizer_s"] <= told.steps[1]["step_s"]
        assert told.steps[0]["learning_rate"] == 0.5
        assert told.started == [("cpu", "", 36)] and told.own_strategy
        states = 2 * 36 * 4 + 2 * 4  # two moments, and a step for each parameter
        assert told.memories[-1] == {"parameters": 144, "gradients": 144, "optimizer_states": states}
        assert told.phases[-1] == "script"
        distui.Engine()
        _step(first)
        assert len(told.steps) == 3
    finally:
        plain_steps.stand_back()


def test_nothing_is_imported_for_it_and_the_module_is_as_ever() -> None:
    code = """
import sys
from distui.core.telemetry.after_import import after_import
seen = []
after_import("email.message", seen.append)
after_import("json", seen.append)
assert "email.message" not in sys.modules and len(seen) == ("json" in sys.modules)
import email.message
import json
assert {module.__name__ for module in seen} == {"email.message", "json"}
assert type(email.message.__loader__).__name__ == type(email.message.__spec__.loader).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if "after_import" in type(finder).__module__]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
