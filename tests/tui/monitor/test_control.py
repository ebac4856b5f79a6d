"""Acting from the dashboard: verbs with their replies, refusals, and what is shown as files."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distui.proto import telemetry_pb2 as pb
from distui.tui.monitor.app import DashboardApp
from distui.tui.monitor.control import ControlScreen, RepliesScreen
from distui.tui.monitor.dialogs import StopScreen
from distui.tui.widgets.table import LineTable
from tests.tui.watching import LARGE, SMALL, known, screen_text, until, watching

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon


def shows(app: DashboardApp, told: str) -> bool:
    return told in screen_text(app)


async def test_a_verb_is_asked_for_and_every_reply_is_shown(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    daemon.replies = [
        pb.ControlReply(rank=0, state="accepted"),
        pb.ControlReply(rank=0, state="done", message="wrote it", payload=b"line one\nline two"),
        pb.ControlReply(rank=1, state="error", message="it is busy"),
    ]
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("c")
        assert isinstance(app.screen, ControlScreen)
        await until(pilot, partial(shows, app, "Log level debug"))
        await pilot.press("d")
        await until(pilot, partial(shows, app, "log level debug: 1 done, rank 1 could not"))
        text = screen_text(app)
        assert "rank 0: done: wrote it" in text and "line two" in text and "rank 1: error: it is busy" in text
        assert daemon.asked == [("log-level", {"level": "debug"})]
        await pilot.press("escape", "c", "down", "enter")
        await until(pilot, lambda: len(daemon.asked) == 2)
        assert daemon.asked[1] == ("stacks", {})
        await pilot.press("escape")
        assert not app.screen.is_modal


async def test_stop_asks_first(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("c", "x")
        await until(pilot, lambda: isinstance(app.screen, StopScreen))
        await pilot.press("escape")
        assert not app.screen.is_modal and not daemon.asked
        await pilot.press("c", "x")
        await until(pilot, lambda: isinstance(app.screen, StopScreen))
        await pilot.press("y")
        await until(pilot, lambda: daemon.asked == [("stop", {})])
        assert isinstance(app.screen, RepliesScreen)


async def test_what_the_daemon_refuses_is_told_in_its_words(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    daemon.refusal = "the job is read-only: telemetry.control = false"
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("c", "c")
        await until(pilot, partial(shows, app, "checkpoint: refused"))
        assert "the job is read-only" in screen_text(app)


async def test_nothing_is_asked_of_a_run_that_has_ended(daemon: FakeDaemon, sample: Any) -> None:
    update = sample.sample_update()
    update.snapshot.run.state = "finished"
    daemon.send(update)
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("c")
        assert "the run has ended: it is finished" in screen_text(app)
        await pilot.press("c")
        assert isinstance(app.screen, ControlScreen) and not daemon.asked


async def test_the_table_and_the_steps_become_csv_and_the_screen_svg(
    daemon: FakeDaemon, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("2")
        await until(pilot, lambda: app.screen.query_one("#view-ranks LineTable", LineTable).rows)
        await pilot.press("e")
        await until(pilot, lambda: list(tmp_path.glob("*.csv")))
        await pilot.press("4", "e", "E")
        await until(pilot, lambda: len(list(tmp_path.glob("*.csv"))) == 2 and list(tmp_path.glob("*.svg")))
    table, steps = sorted(tmp_path.glob("*.csv"), key=lambda path: "steps" in path.name)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(8)]
    assert {"step", "loss", "memory", "node"} <= set(rows[0]) and float(rows[0]["loss"]) == pytest.approx(1.95)
    read = list(csv.DictReader(steps.read_text().splitlines()))
    assert len(read) == 240 and read[-1]["step"] == "240.0" and read[0]["loss"]
    (picture,) = tmp_path.glob("*.svg")
    assert picture.name.startswith(f"{sample.RUN_ID}-throughput-") and picture.read_text().startswith("<svg")
