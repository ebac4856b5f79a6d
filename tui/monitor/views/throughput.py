"""View 4: how fast it goes, and where the time of a step goes."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal

from distui.tui.format import percent, seconds, si
from distui.tui.monitor.history import PHASES
from distui.tui.monitor.views.base import Curve, Frame, Panel, View, draw_curve, draw_split, window_newest
from distui.tui.widgets.chart import LineChart
from distui.tui.widgets.stack import StackedBars, StackedColumns


class ThroughputView(View):
    """Tokens or samples a second, step time, MFU, and the shares of the phases over the steps."""

    TITLE = "Throughput"

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Horizontal(id="throughput-charts"):
            yield Panel("tokens/s", LineChart(unit=si, from_zero=True, id="tokens-chart"), id="tokens-panel")
            yield Panel(
                "step time", LineChart(unit=seconds, from_zero=True, clip=True, id="step-chart"), id="step-panel"
            )
            yield Panel("MFU", LineChart(unit=percent, from_zero=True, id="mfu-chart"), id="mfu-panel")
        with Panel("where the time goes", id="split-panel"):
            yield StackedColumns(empty="n/a: no timed steps", id="split-columns")
            yield StackedBars(unit=seconds, shares=True, id="split-bar")

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        model, history = frame.model, frame.model.history
        column, unit = model.rate
        curve = Curve(column, 2, "n/a: no tokens counted")
        draw_curve(self.query_one("#tokens-chart", LineChart), frame, curve)
        draw_curve(self.query_one("#step-chart", LineChart), frame, Curve("step_s", 1))
        mfu = window_newest(frame, "mfu")
        self.query_one("#mfu-panel").display = mfu is not None
        if mfu is not None:
            draw_curve(self.query_one("#mfu-chart", LineChart), frame, Curve("mfu", 3))
            self.query_one("#mfu-panel", Panel).tell("MFU", percent(mfu))
        rate = si(window_newest(frame, column), unit)
        self.query_one("#tokens-panel", Panel).tell(column.replace("_per_", "/"), rate)
        self.query_one("#step-panel", Panel).tell("step time", seconds(window_newest(frame, "step_s")))
        shares = self.query_one("#split-columns", StackedColumns)
        if shares.is_new(frame.steps_key):
            window = frame.window
            shares.show([*(history.column(name, window) for name in PHASES), history.other(window)])
        draw_split(self.query_one("#split-bar", StackedBars), frame)
        # MFU is told even where it has no chart, because people look for it.
        self.query_one("#split-panel", Panel).tell(
            "where the time goes (mean of the last 50 steps)", f"MFU {percent(mfu)}"
        )
