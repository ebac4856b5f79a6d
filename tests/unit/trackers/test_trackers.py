"""Trackers write what was logged, and refuse what is no metric."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distui.core.errors import UserError
from distui.core.trackers.trackers import CsvTracker, Tracker, metric_values, open_trackers


def test_metrics_are_single_numbers() -> None:
    assert metric_values({"a": 1, "b": torch.tensor(2.5), "c": True, "d": torch.tensor([3.0])}) == {
        "a": 1.0,
        "b": 2.5,
        "c": 1.0,
        "d": 3.0,
    }
    with pytest.raises(UserError, match=r"2 of 3 values.*loss is Tensor of shape \[4\], name is str"):
        metric_values({"ok": 1.0, "loss": torch.zeros(4), "name": "x"})


def test_jsonl_keeps_every_value_as_valid_json(tmp_path: Path) -> None:
    for begin in (0, 2):  # the second is a run that goes on
        (tracker,) = open_trackers("jsonl", "my project", tmp_path, {"lr": 0.1, "path": Path("x")})
        tracker.log({"loss": 1.5}, step=begin)
        tracker.log({"loss": float("nan")}, step=begin + 1)
        tracker.finish()
    lines = [json.loads(line) for line in (tmp_path / "my-project" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.5), (1, "nan"), (2, 1.5), (3, "nan")]
    assert json.loads((tmp_path / "my-project" / "config.json").read_text()) == {"lr": 0.1, "path": "x"}


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_takes_a_metric_that_comes_later_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    tracker = CsvTracker("run", tmp_path)
    tracker.start()
    tracker.log({"loss": 2.0}, step=1)
    tracker.log({"loss": 1.0, "accuracy": 0.5}, step=2)
    tracker.finish()
    tracker = CsvTracker("run", tmp_path)
    tracker.start()
    tracker.log({"accuracy": 0.75}, step=3)
    tracker.finish()
    assert _rows(tracker.path) == [
        {"step": "1", "loss": "2.0", "accuracy": ""},
        {"step": "2", "loss": "1.0", "accuracy": "0.5"},
        {"step": "3", "loss": "", "accuracy": "0.75"},
    ]


class _Own:
    name = "own"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @property
    def tracker(self) -> Any:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: Any) -> None:
        self.calls.append(dict(values))

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((dict(values), step))

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_of_ones_own_stands_beside_the_others(tmp_path: Path) -> None:
    own = _Own()
    assert isinstance(own, Tracker)
    trackers = open_trackers(["csv", own], "run", tmp_path, {"lr": 1})
    assert [tracker.name for tracker in trackers] == ["csv", "own"]
    for tracker in trackers:
        tracker.log({"loss": 3.0}, step=7)
        tracker.finish()
    assert own.calls == ["start", {"lr": 1}, ({"loss": 3.0}, 7), "finish"]


def test_what_is_unknown_missing_or_not_writable_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'wandbb'.*known: jsonl, csv, tensorboard"):
        open_trackers("wandbb", "run", tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError) as caught:
        open_trackers("tensorboard", "run", tmp_path)
    assert caught.value.fix == "pip install tensorboard"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        open_trackers("jsonl", "run", tmp_path / "file")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_writes_events(tmp_path: Path) -> None:
    (tracker,) = open_trackers("tensorboard", "run", tmp_path, {"lr": 0.1})
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert list((tmp_path / "run").glob("events.*"))
