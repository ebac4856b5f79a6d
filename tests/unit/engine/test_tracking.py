"""Logging through the engine: trackers on rank 0 only, the dashboard from every rank."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distui.core.engine.tracking import Tracking
from distui.core.errors import UserError


class _Engine(Tracking):
    """The part of the engine that logging needs."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.ended = False
        self.process_index = rank
        self.telemetry: Any = SimpleNamespace(metrics=lambda step, values: self.sent.append((step, values)))
        self.clock: Any = SimpleNamespace(step=7)
        self.destroy = lambda: setattr(self, "ended", True)


def test_values_reach_the_trackers_of_rank_0_and_the_dashboard_of_all(tmp_path: Path) -> None:
    for rank in (0, 1):
        engine = _Engine(rank)
        engine.init_trackers("run", {"lr": 1}, logging_dir=tmp_path / str(rank))
        engine.log({"loss": torch.tensor(0.5)})
        engine.log({"loss": 0.25}, step=9)
        engine.end_training()
        assert engine.sent == [(7, {"loss": 0.5}), (9, {"loss": 0.25})] and engine.ended
        assert (tmp_path / str(rank)).exists() == (rank == 0)
    lines = [json.loads(line) for line in (tmp_path / "0" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(7, 0.5), (9, 0.25)]


def test_a_launched_job_keeps_them_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTUI_JOB", str(tmp_path))
    engine = _Engine(0)
    engine.init_trackers("run", log_with=["csv", "jsonl"])
    assert engine.get_tracker("csv").name == "csv" and not engine.get_tracker("jsonl", unwrap=True).closed
    with pytest.raises(UserError, match=r"'wandb' is running: started: csv, jsonl"):
        engine.get_tracker("wandb")
    engine.end_training()
    assert (tmp_path / "trackers" / "run" / "metrics.jsonl").exists()
    assert _Engine(1).get_tracker("csv") is None
