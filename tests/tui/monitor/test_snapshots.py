"""How the dashboard looks: each view of one run at 80x24, overviews at 160x50, and its states. All is fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from textual.widgets import Input

from distui.proto import telemetry_pb2 as pb
from distui.tui.monitor.app import VIEWS, DashboardApp
from distui.tui.monitor.views.base import Frame

SMALL, LARGE = (80, 24), (160, 50)
NOW_S = 1000.0

pytestmark = pytest.mark.usefixtures("utc")


@pytest.fixture
def still(sample: Any) -> Callable[..., DashboardApp]:
    """Return an app that shows an update and never ticks; logs come from the sample."""

    async def read_log(rank: int, offset: int, max_bytes: int) -> pb.ReadLogResponse:
        data = sample.log_text(rank)
        start = offset if offset >= 0 else max(0, len(data) + offset)
        return pb.ReadLogResponse(data=data[start : start + max_bytes], next_offset=len(data), size=len(data))

    class StillApp(DashboardApp):
        def on_mount(self) -> None:
            for field in self.screen.query(Input):
                field.cursor_blink = False

        def _frame(self, shown: Any, now_s: float) -> Frame:
            return replace(super()._frame(shown, now_s), read_log=read_log)

    def make(update: pb.Update, theme: str = "textual-dark") -> DashboardApp:
        app = StillApp(sample.RUN_ID, refresh_hz=0.001, theme=theme, clock=lambda: NOW_S)
        app.model.apply(update, NOW_S)
        return app

    return make


@pytest.mark.parametrize("number", range(1, len(VIEWS) + 1), ids=[view.TITLE.lower() for view in VIEWS])
def test_look_of_a_view(number: int, still: Any, sample: Any, snap_compare: Any) -> None:
    app = still(sample.sample_update(slow_rank=3))
    assert snap_compare(app, press=[str(number)], terminal_size=SMALL)


@pytest.mark.parametrize("num_ranks", [2, 1000])
def test_look_of_a_large_overview(num_ranks: int, still: Any, sample: Any, snap_compare: Any) -> None:
    app = still(sample.sample_update(num_ranks, num_steps=160, slow_rank=num_ranks - 1))
    assert snap_compare(app, press=["1"], terminal_size=LARGE)


LOOKS: dict[str, tuple[str, list[str]]] = {
    "starting": ("starting_update", ["1"]),
    "hang": ("hang_update", ["6"]),
    "cpu": ("cpu_update", ["1"]),
    "rank": ("sample_update", ["1", "enter"]),
    "help": ("sample_update", ["2", "question_mark"]),
    "filter": ("sample_update", ["2", "slash", *"node01"]),
    "paused": ("sample_update", ["5", "left"]),
    "light": ("sample_update", ["1"]),
    "axes": ("axes_update", ["2", "g", "g"]),
    "pipeline": ("axes_update", ["6"]),
}


@pytest.mark.parametrize("name", LOOKS)
def test_look_of_a_state(name: str, still: Any, sample: Any, snap_compare: Any) -> None:
    update, press = LOOKS[name]
    app = still(getattr(sample, update)(), "textual-light" if name == "light" else "textual-dark")
    assert snap_compare(app, press=press, terminal_size=SMALL)
