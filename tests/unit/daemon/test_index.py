"""The index of runs: as the folders are, without reading again what has not changed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.runs import index as index_module
from distui.daemon.runs.folders import run_folders
from distui.daemon.runs.index import RunIndex


def make(parent: Path, name: str, started_s: float) -> RunFolder:
    run = RunFolder(parent / name)
    if not run.path.is_dir():
        run.create()
    run.spec.write_text(json.dumps({"run_id": name, "started_s": started_s}))
    return run


def settle(parent: Path) -> None:
    """Make all changes old: as if a second had passed."""
    past_ns = time.time_ns() - 10 * index_module.SETTLED_NS
    for path in (parent, *parent.iterdir()):
        os.utime(path, ns=(past_ns, past_ns))


def names(index: RunIndex, parent: Path) -> list[str]:
    found = [run.run_id for run in index.folders({parent})]
    assert found == [run.run_id for run in run_folders([parent])]
    return found


def test_it_follows_what_comes_and_goes(tmp_path: Path) -> None:
    index, parent = RunIndex(), tmp_path / "runs"
    assert names(index, parent) == []
    make(parent, "b", 20.0)
    make(parent, "a", 10.0)
    assert names(index, parent) == ["b", "a"]
    (parent / "being-made").mkdir(mode=0o700)
    settle(parent)
    assert names(index, parent) == ["b", "a"] == names(index, parent)
    make(parent, "being-made", 15.0)
    assert names(index, parent) == ["b", "being-made", "a"]
    shutil.rmtree(parent / "b")
    assert names(index, parent) == ["being-made", "a"]
    assert index.has(parent / "a") and not index.has(parent / "b")


def test_runs_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        make(tmp_path, f"run-{number}", 100.0 + number)
    (tmp_path / "no-run").mkdir()
    settle(tmp_path)
    index = RunIndex()
    first = index.folders({tmp_path})
    read: list[str] = []
    monkeypatch.setattr(index_module, "check_run", lambda run: read.append(run.run_id))
    assert index.folders({tmp_path}) is first and not read
    make(tmp_path, "newest", 500.0)
    assert index.folders({tmp_path})[0].run_id == "newest" and read == ["newest"]
