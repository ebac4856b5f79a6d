"""Trackers of services, each against its installed package, offline: what was logged is read back from its files."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from distui.core.errors import UserError
from distui.core.trackers.trackers import Tracker, open_trackers

CONFIG = {"lr": 0.1, "model": "tiny"}
# These packages warn about themselves and about each other's dependencies; that is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")


def _train(name: str, folder: Path, **options: Any) -> Tracker:
    if importlib.util.find_spec(name) is None:  # not imported here: trackio reads its folder when it is
        pytest.skip(f"{name} is not installed")
    (tracker,) = open_trackers(name, "run", folder, CONFIG, {name: {"offline": True, **options}})
    for step in (1, 2, 3):
        tracker.log({"train/loss": 4.0 / step, "acc": 0.5}, step=step)
    return tracker


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = _train("wandb", tmp_path)
    assert dict(tracker.tracker.config) == CONFIG
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_mlflow(tmp_path: Path) -> None:
    tracker = _train("mlflow", tmp_path)
    run_id = tracker.tracker.info.run_id
    tracker.finish()
    (metric,) = tmp_path.glob(f"mlruns/*/{run_id}/metrics/train/loss")
    assert [float(line.split()[1]) for line in metric.read_text().splitlines()] == pytest.approx([4.0, 2.0, 4 / 3])
    (parameter,) = tmp_path.glob(f"mlruns/*/{run_id}/params/lr")
    assert parameter.read_text() == "0.1"


def test_comet_ml(tmp_path: Path) -> None:
    tracker = _train("comet_ml", tmp_path)
    tracker.finish()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        text = file.read("messages.json").decode()
    assert '"train/loss"' in text and '"lr"' in text


def test_clearml(tmp_path: Path) -> None:
    tracker = _train("clearml", tmp_path)
    folder = Path(tracker.tracker.get_offline_mode_folder())
    tracker.finish()
    found = [path for path in (folder, folder.with_suffix(".zip")) if path.exists()]
    assert found
    if folder.is_dir():
        assert "loss" in "".join(path.read_text(errors="replace") for path in folder.rglob("metrics*"))


def test_trackio(tmp_path: Path) -> None:
    tracker = _train("trackio", tmp_path)
    tracker.finish()
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet_ml", "clearml", "trackio"])
def test_a_service_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        open_trackers(name, "run", tmp_path)
    assert caught.value.fix == f"pip install {name}"


def test_several_trackers_at_once_get_the_same(tmp_path: Path) -> None:
    trackers = open_trackers(["jsonl", "csv"], "run", tmp_path, CONFIG)
    for tracker in trackers:
        tracker.log({"loss": 1.5}, step=7)
        tracker.finish()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"]) == (7, 1.5)
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines() == ["step,loss", "7,1.5"]
