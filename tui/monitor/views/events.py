"""View 8: what happened, and what is wrong now."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Static

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import clock, duration, num_bytes
from distui.tui.monitor.verdict import blame
from distui.tui.monitor.views.base import Frame, Panel, View
from distui.tui.widgets.table import Column, LineTable

_LEVELS = ("· info", "! warning", "✗ error")
_TONES = ("muted", "warn", "bad")
_SOURCES = {-1: "launcher", -2: "daemon"}


@dataclass(frozen=True)
class _Line:
    key: int
    time_s: float
    level: int
    source: str
    kind: str
    message: str
    attributes: tuple[tuple[str, str], ...]


def _lines(events: list[pb.TimedEvent]) -> list[_Line]:
    return [
        _Line(
            key=number,
            time_s=event.time_s,
            level=min(int(event.event.level), 2),
            source=_SOURCES.get(event.rank, f"rank {event.rank}"),
            kind=event.event.kind,
            message=event.event.message,
            attributes=tuple(sorted(event.event.attributes.items())),
        )
        for number, event in enumerate(events)
    ]


_COLUMNS: tuple[Column[_Line], ...] = (
    Column("time", lambda e: e.time_s, clock, "left", width=8),
    Column(
        "level", lambda e: e.level, lambda v: _LEVELS[v], "left", width=9, priority=2, tone=lambda e: _TONES[e.level]
    ),
    Column("from", lambda e: e.source, str, "left", width=8, priority=1),
    Column("kind", lambda e: e.kind, str, "left", tone=lambda e: _TONES[e.level] if e.level else ""),
    Column("message", lambda e: e.message, str, "left", width=20, flex=True),
)

_DIAGNOSIS: tuple[Column[pb.Diagnosis], ...] = (
    Column("kind", lambda d: d.kind, lambda v: f"▲ {v}", "left", tone=lambda d: "bad"),
    Column("for", lambda d: d.since_s, duration),
    Column("group", lambda d: d.group or None, lambda v: v or "n/a", "left", priority=2),
    Column(
        "call", lambda d: f"{d.collective} #{d.seq}" if d.collective else None, lambda v: v or "n/a", "left", priority=1
    ),
    Column("message", lambda d: d.message, str, "left", width=20, flex=True),
)


class EventsView(View):
    """Diagnosis above, events below, the whole message of the event under the cursor at the bottom."""

    TITLE = "Events"

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Panel("diagnosis", id="diagnosis-panel"):
            yield LineTable[pb.Diagnosis](
                _DIAGNOSIS, lambda d: (d.kind, d.group, d.seq, tuple(d.ranks)), empty="nothing is wrong", id="diagnosis"
            )
        with Panel("events", id="events-panel"):
            yield LineTable[_Line](
                _COLUMNS, lambda e: e.key, sort=0, descending=True, empty="no event", id="events-table"
            )
        with Panel("the whole message", id="detail-panel"):
            yield Static("", id="event-detail", markup=False)

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        model = frame.model
        found = [pb.Diagnosis() for _ in model.diagnosis]
        for shown, diagnosis in zip(found, model.diagnosis, strict=True):
            shown.CopyFrom(diagnosis)
            shown.message = diagnosis.message or blame(diagnosis, model)
        self.query_one("#diagnosis", LineTable).show(found)
        dropped = model.snapshot.dropped if model.snapshot is not None else 0
        self.query_one("#diagnosis-panel", Panel).tell("diagnosis", f"{len(found)} now" if found else "none")
        self.query_one("#events-table", LineTable).show(_lines(list(model.events)))
        lost = f", {dropped:,} records lost to overload" if dropped else ""
        self.query_one("#events-panel", Panel).tell("events", f"{len(model.events):,}{lost}")
        self._detail()

    @on(LineTable.Moved, "#events-table")
    def _detail(self) -> None:
        table = self.query_one("#events-table", LineTable)
        if not table.rows:
            self.query_one("#event-detail", Static).update("")
            return
        event: _Line = table.rows[table.cursor]
        facts = "  ".join(f"{name} {_number(name, value)}" for name, value in event.attributes)
        text = "\n".join(filter(None, (event.message, facts)))
        self.query_one("#event-detail", Static).update(textwrap.indent(text, " "))

    def main_widget(self) -> Widget:
        """The table of events takes the keys."""
        return self.query_one("#events-table")


def _number(name: str, value: str) -> str:
    return num_bytes(int(value)) if name.endswith("_bytes") and value.isdigit() else value
