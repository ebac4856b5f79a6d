"""View 3: what fills each rank's memory, measured beside planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from textual.app import ComposeResult
from textual.widget import Widget

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import num_bytes
from distui.tui.monitor.model import CATEGORIES, OTHER, MemoryUse, category_title, memory_of
from distui.tui.monitor.views.base import Frame, Panel, View, draw_memory
from distui.tui.widgets.stack import StackedBars
from distui.tui.widgets.table import Column, LineTable


@dataclass(frozen=True)
class _Line:
    rank: pb.RankState | None
    planned: dict[str, int] | None = None

    @cached_property
    def use(self) -> MemoryUse | None:
        """What the rank uses, read only where it is shown."""
        return memory_of(self.rank) if self.rank is not None else None

    @property
    def name(self) -> str:
        return str(self.rank.rank) if self.rank is not None else "plan"

    def of(self, category: str) -> int | None:
        if self.planned is not None:
            return self.planned.get(category)
        return self.use.sizes.get(category) if self.use is not None else None

    def total(self) -> int | None:
        if self.planned is not None:
            return sum(self.planned.values())
        return self.use.total if self.use is not None else None


def _category(name: str) -> Callable[[_Line], int | None]:
    return lambda row: row.of(name)


_TITLES = {"parameters": "params", "gradients": "grads", "optimizer_states": "optim", "activations": "activ"}


def _columns() -> list[Column[_Line]]:
    columns: list[Column[_Line]] = [
        Column("rank", lambda r: r.name, str, "left", tone=lambda r: "calm" if r.planned is not None else ""),
        Column("total", lambda r: r.total(), num_bytes, width=8),
    ]
    for priority, name in enumerate((*CATEGORIES, OTHER)):
        title = _TITLES.get(name, category_title(name))
        columns.append(Column(title, _category(name), num_bytes, priority=2 + priority % 2, width=8))
    columns.append(Column("peak", lambda r: r.use.peak if r.use else None, num_bytes, priority=4, width=8))
    columns.append(Column("limit", lambda r: r.use.limit if r.use else None, num_bytes, priority=5, width=8))
    return columns


class MemoryView(View):
    """Bars by category on one scale, then the numbers."""

    TITLE = "Memory"

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Panel("by category", id="memory-bars-panel"):
            yield StackedBars(unit=num_bytes, legend_first=True, id="memory-bars")
        with Panel("in numbers", id="memory-table-panel"):
            yield LineTable[_Line](_columns(), lambda r: r.name, empty="no rank yet", id="memory-table")

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        model = frame.model
        draw_memory(self.query_one("#memory-bars", StackedBars), model.ranks, model)
        rows = [_Line(rank) for rank in model.ranks]
        planned = dict(model.run.planned_memory_bytes)
        if planned:
            rows.insert(0, _Line(None, planned))
        self.query_one("#memory-table", LineTable).show(rows)
        fullest = model.fullest_rank()
        most = f"rank {fullest.rank} has the most, {num_bytes(fullest.memory_bytes)}" if fullest is not None else "n/a"
        self.query_one("#memory-bars-panel", Panel).tell("memory by category", most)
        plan = f"planned {num_bytes(model.planned_bytes())} a rank" if planned else "no plan was made: planned is n/a"
        self.query_one("#memory-table-panel", Panel).tell("in numbers", plan)

    def main_widget(self) -> Widget:
        """The table takes the keys."""
        return self.query_one("#memory-table")
