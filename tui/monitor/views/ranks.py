"""View 2: every rank in a table, and their step times over the steps as a heatmap."""

from __future__ import annotations

import re
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Input

from distui.tui.format import seconds
from distui.tui.monitor.views.base import Frame, Key, Panel, View, draw_map, map_title
from distui.tui.monitor.views.rank_columns import PLACE, RANK_COLUMNS, RankLine, show_ranks
from distui.tui.widgets.heatmap import Heatmap
from distui.tui.widgets.layout import axes_in_use
from distui.tui.widgets.table import LineTable


class RanksView(View):
    """Sort with s, S and r, filter with /, open a rank with Enter."""

    TITLE = "Ranks"
    KEYS = (
        Key("Enter", "look into the rank under the cursor; Esc comes back"),
        Key("s  S  r", "sort by the next or previous column; reverse"),
        Key("g", "group by the next of the axes pp, dp, cp, tp"),
        Key("/", "filter by a regular expression; Esc clears it"),
        Key("z", "heatmap: all ranks in sight, or one cell a rank"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("s", "table('sort(1)')", "Sort", show=True),
        Binding("g", "group", "Group by axis", show=False),
        Binding("z", "zoom", "Zoom map", show=False),
        Binding("escape", "clear_filter", "Clear filter", show=False),
    ]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._frame: Frame | None = None
        self._pattern = ""
        """The filter that the table has."""
        self._axis = ""
        """The axis by which the ranks are grouped; "" is none."""

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Panel("ranks", id="ranks-panel"):
            yield LineTable[RankLine](RANK_COLUMNS, lambda r: r.rank, sort=0, empty="no rank yet", id="ranks-table")
            yield Input(placeholder="regular expression, over all columns", id="ranks-filter", compact=True)
        with Panel("step time by rank", id="ranks-map-panel"):
            yield Heatmap(unit=seconds, id="ranks-map")

    def on_mount(self) -> None:
        """Hide the filter until it is asked for."""
        self.query_one("#ranks-filter").display = False

    @property
    def _table(self) -> LineTable[RankLine]:
        return self.query_one("#ranks-table", LineTable)

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        if frame.model.hosts and (self._frame is None or not self._frame.model.hosts):
            self._table.sort_column = None  # the sickest host first
        self._frame = frame
        show_ranks(self._table, frame.model, frame.now_s, self._axis)
        draw_map(self.query_one("#ranks-map", Heatmap), frame)
        self.query_one("#ranks-map-panel", Panel).tell(map_title(frame.model))
        self._tell()

    def _tell(self) -> None:
        table, pattern = self._table, self._pattern
        hosts = self._frame.model.hosts if self._frame else []
        number = f"{len(table.rows):,} of {self._frame.model.run.world_size if self._frame else 0:,}"
        if hosts:
            number += f", the sickest of each of {len(hosts):,} hosts"
        if table.sort_column is not None:
            number += f"  by {table.columns[table.sort_column].title} {'▼' if table.descending else '▲'}"
        self.query_one("#ranks-panel", Panel).tell("ranks", number + (f"  filter /{pattern}/" if pattern else ""))

    def main_widget(self) -> Widget:
        """The table takes the keys."""
        return self._table

    def action_filter(self) -> None:
        """Open the filter."""
        box = self.query_one("#ranks-filter", Input)
        box.display = True
        box.focus()

    def action_clear_filter(self) -> None:
        """Close the filter and show all ranks."""
        box = self.query_one("#ranks-filter", Input)
        box.value, box.display = "", False
        self._pattern = ""
        self._table.filter(None)
        self._table.focus()
        self._tell()

    @on(Input.Changed, "#ranks-filter")
    def _filter(self, event: Input.Changed) -> None:
        """Filter while typing; an expression that is not complete yet leaves the last filter."""
        try:
            pattern = re.compile(event.value, re.IGNORECASE) if event.value else None
        except re.error as error:
            self.query_one("#ranks-panel", Panel).tell("ranks", f"not a regular expression yet: {error}")
            return
        self._pattern = event.value
        self._table.filter(pattern)
        self._tell()

    @on(Input.Submitted, "#ranks-filter")
    def _filtered(self, event: Input.Submitted) -> None:
        event.input.display = bool(event.value)
        self._table.focus()

    def action_group(self) -> None:
        """Sort by the coordinate on the next axis, so that the ranks of one group follow each other."""
        sizes = self._frame.model.axes if self._frame is not None else None
        if self._frame is None or sizes is None or PLACE not in self._table.columns:
            self.notify("all ranks are data-parallel: there are no axes to group by", timeout=2)
            return
        axes = axes_in_use(sizes)
        self._axis = axes[(axes.index(self._axis) + 1) % len(axes)] if self._axis in axes else axes[0]
        self._table.sort_by(PLACE)
        self.show(self._frame)

    def action_zoom(self) -> None:
        """Switch the heatmap between all ranks in sight and one cell a rank."""
        self.query_one("#ranks-map", Heatmap).toggle_fit()

    def action_table(self, action: str) -> None:
        """Hand a key to the table from wherever the focus is."""
        self.call_later(self._table.run_action, action)
        self.call_later(self._tell)
