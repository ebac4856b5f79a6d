"""One rank on a screen of its own: its memory, its times, its log."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Static

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import NA, count, duration, num_bytes, scalar, seconds, si
from distui.tui.monitor.history import PHASE_NAMES, PHASES
from distui.tui.monitor.log_tail import LogTail
from distui.tui.monitor.model import memory_of, optional
from distui.tui.monitor.verdict import STATE_GLYPHS
from distui.tui.monitor.views.base import Frame, Panel, draw_memory
from distui.tui.monitor.views.rank_columns import phase_of, place_of
from distui.tui.widgets.chart import LineChart, Series
from distui.tui.widgets.keys import KeyLine
from distui.tui.widgets.layout import axes_in_use, place_words
from distui.tui.widgets.stack import Bar, StackedBars


class RankScreen(Screen[None]):
    """Everything known of one rank; Esc goes back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "dismiss", "Back", key_display="esc"),
        Binding("left_square_bracket", "neighbour(-1)", "Previous", key_display="["),
        Binding("right_square_bracket", "neighbour(1)", "Next", key_display="]"),
    ]

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self._frame: Frame | None = None

    def compose(self) -> ComposeResult:
        """Make the parts."""
        yield Static("", id="rank-facts", markup=False)
        with Horizontal(id="rank-bars"):
            yield Panel("memory", StackedBars(unit=num_bytes, id="rank-memory"), id="rank-memory-panel")
            yield Panel("last step", StackedBars(unit=seconds, shares=True, id="rank-split"), id="rank-split-panel")
        with Panel("step time", id="rank-chart-panel"):
            yield LineChart(unit=seconds, from_zero=True, clip=True, id="rank-chart")
        with Panel("log", id="rank-log-panel"):
            yield LogTail(id="rank-log")
        yield KeyLine()

    def on_mount(self) -> None:
        """Scroll the log with the keys."""
        self.query_one(LogTail).focus()

    @property
    def ready(self) -> bool:
        """Whether all of its parts are there: a screen is in sight before they are."""
        return all(self.query(part) for part in ("#rank-memory", "#rank-split", "#rank-chart", "#rank-log"))

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        if not self.ready:
            return
        self._frame = frame
        model, state = frame.model, frame.model.rank(self.rank)
        log = self.query_one(LogTail)
        log.follow(self.rank)
        if not frame.frozen:
            log.poll(frame.read_log)
        self.query_one("#rank-log-panel", Panel).tell(f"log of rank {self.rank}", log.told)
        rows = model.history.window_rows(frame.num_steps, frame.end_step)
        place = model.row(self.rank)
        rows = [row for row in rows if place < len(row.step_s)]
        times = [row.step_s[place] for row in rows]
        chart = self.query_one("#rank-chart", LineChart)
        chart.show([Series("step time", [row.step for row in rows], times, 1)], empty="no steps yet")
        if state is None:
            self.query_one("#rank-facts", Static).update(f" rank {self.rank}: nothing heard of it yet")
            return
        self.query_one("#rank-facts", Static).update(self._facts(state, frame))
        use = memory_of(state)
        draw_memory(self.query_one("#rank-memory", StackedBars), [state], model, labels=False)
        self.query_one("#rank-memory-panel", Panel).tell("memory", f"peak {num_bytes(use.peak)}")
        self._split(state)
        self.query_one("#rank-chart-panel", Panel).tell("step time", seconds(optional(state, "step_s")))

    def _facts(self, state: pb.RankState, frame: Frame) -> str:
        now_s = frame.model.now(frame.now_s)
        phase, phase_s = phase_of(state, now_s)
        device = " ".join(filter(None, (state.device, f"({state.device_name})" if state.device_name else "")))
        doing = phase or NA
        if phase and phase_s is not None and phase_s >= 1:
            doing += f" for {duration(phase_s)}"
        seen = optional(state, "last_seen_s")
        step = state.last_step if state.HasField("last_step") else pb.Step()
        sizes = frame.model.axes
        found = place_of(sizes, axes_in_use(sizes), state.rank) if sizes is not None else None
        place = f" ({place_words(found)})" if found else ""
        lines = [
            f" {STATE_GLYPHS.get(state.state, '?')} rank {state.rank}{place}  {state.state}  on {state.node or NA}"
            f"  pid {state.pid or NA}  {device or NA}",
            f" step {count(optional(state, 'step'))}  loss {scalar(optional(state, 'loss'))}"
            f"  grad norm {scalar(optional(step, 'grad_norm'))}  lr {scalar(optional(step, 'learning_rate'))}"
            f"  {si(optional(state, frame.model.rate[0]), frame.model.rate[1])}",
            f" {doing}  {si(state.num_parameters or None)} parameters"
            f"  last heard {duration(now_s - seen) + ' ago' if seen else NA}",
        ]
        if state.error:
            lines[2] += f"  ✗ {state.error}"
        return "\n".join(lines)

    def _split(self, state: pb.RankState) -> None:
        bars = self.query_one("#rank-split", StackedBars)
        if not state.HasField("last_step"):
            bars.show([], empty="no step yet")
            return
        parts = [getattr(state.last_step, name) for name in PHASES]
        total = state.last_step.step_s
        self.query_one("#rank-split-panel", Panel).tell("last step", seconds(total or None))
        if not any(parts):
            bars.show([], empty="n/a: this rank does not time the parts of a step")
            return
        parts.append(max(0.0, total - sum(parts)))
        bars.show([Bar("", list(zip(PHASE_NAMES, parts, strict=True)))])

    def action_neighbour(self, by: int) -> None:
        """Look into the rank before or after this one."""
        size = max(1, self._frame.model.run.world_size if self._frame else 1)
        self.rank = (self.rank + by) % size
        if self._frame is not None:
            self.show(self._frame)

    async def action_dismiss(self, result: None = None) -> None:
        """Go back to the dashboard."""
        self.dismiss(result)
