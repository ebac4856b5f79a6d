"""View 5: is it learning: loss, gradient norm, learning rate, and what the script logs."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal

from distui.tui.format import scalar
from distui.tui.monitor.views.base import Curve, Frame, Key, Panel, View, draw_curve, window_newest
from distui.tui.widgets.chart import MARK_GLYPHS, LineChart, Series

_CURVES = (
    ("loss", "loss", "n/a: the script reports no loss"),
    ("grad_norm", "gradient norm", "n/a: no norm without clipping"),
    ("learning_rate", "learning rate", "n/a"),
)


class LossView(View):
    """One chart a quantity, with the events marked on their axes."""

    TITLE = "Loss"
    KEYS = (Key("m", "show the next metric that the script logs"),)
    BINDINGS: ClassVar[list[BindingType]] = [Binding("m", "metric", "Next metric", show=False)]

    def compose(self) -> ComposeResult:
        """Make the parts."""
        yield Panel("loss", LineChart(id="loss-chart"), id="loss-panel")
        with Horizontal(id="loss-row"):
            yield Panel("gradient norm", LineChart(id="grad_norm-chart"), id="grad_norm-panel")
            yield Panel("learning rate", LineChart(id="learning_rate-chart"), id="learning_rate-panel")
            yield Panel("logged", LineChart(id="metric-chart"), id="metric-panel")

    def on_mount(self) -> None:
        """Begin with the first metric."""
        self._metric = 0
        self._frame: Frame | None = None

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        self._frame = frame
        for color, (column, title, missing) in enumerate(_CURVES):
            chart = self.query_one(f"#{column}-chart", LineChart)
            draw_curve(chart, frame, Curve(column, color, missing))
            self.query_one(f"#{column}-panel", Panel).tell(title, scalar(window_newest(frame, column)))
        marks = frame.model.event_steps()
        if marks:
            kinds = dict.fromkeys(f"{MARK_GLYPHS[min(level, 2)]} {kind}" for _, kind, level in marks)
            number = scalar(window_newest(frame, "loss"))
            self.query_one("#loss-panel", Panel).tell("loss", f"{number}   {'  '.join(list(kinds)[:4])}")
        self._show_metric(frame)

    def _show_metric(self, frame: Frame) -> None:
        names = sorted(frame.model.metrics)
        self.query_one("#metric-panel").display = bool(names)
        if not names:
            return
        name = names[self._metric % len(names)]
        points = [(step, value) for _, step, value in frame.model.metrics[name]]
        chart = self.query_one("#metric-chart", LineChart)
        chart.show([Series(name, [step for step, _ in points], [value for _, value in points], 3)])
        more = f"  (m: next of {len(names)})" if len(names) > 1 else ""
        self.query_one("#metric-panel", Panel).tell(name, scalar(points[-1][1]) + more)

    def action_metric(self) -> None:
        """Show the next metric."""
        self._metric += 1
        if self._frame is not None:
            self._show_metric(self._frame)
