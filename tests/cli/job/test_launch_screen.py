"""Which face a job gets, and what each way of leaving the dashboard means for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from distui.core.config.schema import Config
from distui.core.paths import RunFolder
from distui.launcher.job import launch
from distui.launcher.job.launch import wants_screen
from distui.launcher.job.outcome import Outcome
from distui.launcher.job.request import LaunchRequest
from distui.tui.monitor import app


class FakeJob:
    """Ends when it is stopped or finished."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.stopped_by: str | None = None
        self.num_stops = 0
        self.is_let_go = False

    def ended(self) -> int | None:
        return 0 if self.stopped_by else None

    def stop(self) -> None:
        self.num_stops += 1
        self.stopped_by = "SIGINT"

    def let_go(self) -> None:
        self.is_let_go = True

    def finish(self) -> Outcome:
        return Outcome("stopped", 130, "") if self.stopped_by else Outcome("finished", 0, "")


@pytest.mark.parametrize(
    ("answer", "stops", "let_go", "state"),
    [("ended", False, False, "finished"), ("quit", False, True, None), ("stop", True, False, "stopped")],
)
@pytest.mark.parametrize("app_calls_on_stop", [True, False])
def test_leaving_the_dashboard(
    answer: str,
    stops: bool,
    let_go: bool,
    state: str | None,
    app_calls_on_stop: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job: Any = FakeJob(RunFolder(tmp_path / "run"))

    def dashboard(socket: Path, run_id: str, *, follow_job: Any, on_stop: Any, on_lost: Any) -> str:
        assert (socket, run_id, follow_job()) == (tmp_path / "d.sock", "run", None)
        assert on_lost == job.let_go
        if answer == "stop" and app_calls_on_stop:
            on_stop()
        return answer

    monkeypatch.setattr(app, "run_dashboard", dashboard)
    outcome = launch._look_at(Config(), job, tmp_path / "d.sock")
    assert (outcome.state if outcome else None) == state
    assert (job.num_stops, job.is_let_go) == (int(stops), let_go)


@pytest.mark.parametrize(
    ("environ", "no_tui", "tty", "screen"),
    [
        ({"TERM": "xterm"}, False, True, True),
        ({"TERM": "xterm"}, True, True, False),
        ({"TERM": "xterm"}, False, False, False),
        ({"TERM": "dumb"}, False, True, False),
        ({}, False, True, False),
        ({"TERM": "xterm", "DISTUI_NO_TUI": "1"}, False, True, False),
        ({"TERM": "xterm", "DISTUI_NO_TUI": "0"}, False, True, True),
    ],
)
def test_the_dashboard_is_for_terminals(
    environ: dict[str, str], no_tui: bool, tty: bool, screen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "DISTUI_NO_TUI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    assert wants_screen(LaunchRequest(["train.py"], no_tui=no_tui)) is screen
