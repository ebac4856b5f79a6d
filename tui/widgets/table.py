"""A table on the Line API: sortable, filterable, with a cursor; it drops whole columns where the screen is narrow."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from distui.tui.format import cut
from distui.tui.widgets.drawn import KeptLines
from distui.tui.widgets.palette import Ink, line

Row = TypeVar("Row")
SAMPLED_ROWS = 64
"""How many rows beside those in sight are looked at for how wide a column must be."""


@dataclass(frozen=True)
class Column(Generic[Row]):
    """How one property of a row is found, written and coloured.

    `value` gives None for what is not available, else something hashable that `text` writes, always alike. Columns of
    the highest `priority` number are dropped first. `flex` takes the width that is left, `draw` then gets that width.
    """

    title: str
    value: Callable[[Row], Any]
    text: Callable[[Any], str] = str
    align: Literal["left", "right"] = "right"
    priority: int = 0
    width: int = 0
    flex: bool = False
    draw: Callable[[Any, int], str] | None = None
    tone: Callable[[Row], str] | None = None


class LineTable(KeptLines, ScrollView, Generic[Row], can_focus=True):
    """Rows of any type in columns. `show` gives it rows; the cursor stays with its row's key."""

    DEFAULT_CSS = """
    LineTable { height: 1fr; overflow-x: hidden; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "edge(0)", "First", show=False),
        Binding("end", "edge(-1)", "Last", show=False),
        Binding("enter", "select", "Open", show=False),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort by previous column", show=False),
        Binding("r", "reverse", "Reverse order", show=False),
    ]

    cursor: reactive[int] = reactive(0)

    class RowMessage(Message):
        """Something about one row."""

        def __init__(self, table: LineTable[Any], key: Hashable) -> None:
            super().__init__()
            self.table, self.key = table, key

        @property
        def control(self) -> LineTable[Any]:
            """The table."""
            return self.table

    class Selected(RowMessage):
        """Enter or a click on a row."""

    class Moved(RowMessage):
        """The cursor is on another row. Not a kind of Selected: whoever listens for that would hear this too."""

    def __init__(
        self,
        columns: Sequence[Column[Row]],
        key: Callable[[Row], Hashable],
        *,
        sort: int | None = None,
        descending: bool = False,
        empty: str = "nothing yet",
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.columns, self._key = list(columns), key
        self.sort_column, self.descending = sort, descending
        self.empty = empty
        self._all: list[Row] = []
        self._rows: list[Row] = []
        self._filter: re.Pattern[str] | None = None
        self._layout: list[tuple[Column[Row], int]] = []
        self._cursor_styles: dict[Style, Style] = {}
        self._widths: dict[int, int] = {}
        """Of each column, how wide its widest value was so far."""

    @property
    def rows(self) -> list[Row]:
        """The rows that are shown, in their order."""
        return self._rows

    @property
    def num_all_rows(self) -> int:
        """How many rows there are before the filter."""
        return len(self._all)

    @property
    def cursor_key(self) -> Hashable | None:
        """The key of the row under the cursor."""
        return self._key(self._rows[self.cursor]) if self.cursor < len(self._rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        """Take new rows; sort, filter and cursor stay."""
        self._all = list(rows)
        self._arrange()

    def toggle_column(self, column: Column[Row], place: int) -> None:
        """Add a column at `place`, or take it away; what the rows are sorted by stays."""
        by = self.columns[self.sort_column] if self.sort_column is not None else None
        if column in self.columns:
            self.columns.remove(column)
        else:
            self.columns.insert(place, column)
        self.sort_column = self.columns.index(by) if by in self.columns else None
        self._widths.clear()

    def sort_by(self, column: Column[Row]) -> None:
        """Sort by a column, in rising order."""
        self.sort_column, self.descending = self.columns.index(column), False

    def filter(self, pattern: re.Pattern[str] | None) -> None:
        """Show only the rows in whose text the pattern is found."""
        self._filter = pattern
        self._widths.clear()
        self._arrange()

    def _arrange(self) -> None:
        key = self.cursor_key
        rows = self._all
        if (pattern := self._filter) is not None:
            rows = [row for row in rows if pattern.search(self.row_text(row))]
        if self.sort_column is not None:
            value = self.columns[self.sort_column].value
            known = [row for row in rows if value(row) is not None]
            known.sort(key=value, reverse=self.descending)
            rows = known + [row for row in rows if value(row) is None]
        self._rows = rows
        place = next((index for index, row in enumerate(rows) if self._key(row) == key), None)
        self.set_reactive(LineTable.cursor, max(0, min(self.cursor if place is None else place, len(rows) - 1)))
        self._lay_out()

    def row_text(self, row: Row) -> str:
        """Return a row's cells as one line, for filters and exports."""
        return "  ".join(self._cell(column, row, 0) for column in self.columns if column.draw is None)

    def _cell(self, column: Column[Row], row: Row, width: int) -> str:
        value = column.value(row)
        return column.draw(value, width) if column.draw is not None else column.text(value)

    def _lay_out(self) -> None:
        """Choose the columns that fit whole, by priority, and give what is left to the flexible one."""
        if not self.is_attached or not self.size.width:
            return
        widths = []
        looked_at = self._looked_at()
        for index, column in enumerate(self.columns):
            title = len(column.title) + (2 if index == self.sort_column else 0)
            content = 0
            if column.draw is None and not column.flex:
                found = max((len(column.text(column.value(row))) for row in looked_at), default=0)
                content = self._widths[index] = max(found, self._widths.get(index, 0))
            widths.append(max(title, content, column.width))
        room = self.size.width - 1
        kept = list(range(len(self.columns)))
        while len(kept) > 1 and sum(widths[index] + 2 for index in kept) - 2 > room:
            kept.remove(max(reversed(kept), key=lambda index: self.columns[index].priority))
        spare = room - sum(widths[index] + 2 for index in kept) + 2
        flexible = [index for index in kept if self.columns[index].flex]
        for number, index in enumerate(flexible):
            widths[index] += spare // len(flexible) + (1 if number < spare % len(flexible) else 0)
        if not flexible and len(kept) > 1:
            # No column asks for the rest: columns breathe, up to 4 more cells each.
            extra = min(4, spare // len(kept))
            for index in kept[1:]:
                widths[index] += extra
        self._layout = [(self.columns[index], widths[index]) for index in kept]
        self.virtual_size = Size(self.size.width, len(self._rows) + 1)
        self.changed()

    def _looked_at(self) -> list[Row]:
        """Return the rows by which columns are laid out: those in sight, and of a thousand others some.

        Columns never become narrower, so that they do not move while numbers change.
        """
        rows, top = self._rows, self.scroll_offset.y
        stride = max(1, len(rows) // SAMPLED_ROWS)
        return [*rows[top : top + self.size.height], *rows[::stride], *rows[-1:]]

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Make room for what comes in sight."""
        super().watch_scroll_y(old_value, new_value)
        if round(old_value) != round(new_value):
            self._lay_out()

    def on_resize(self) -> None:
        """Choose the columns anew."""
        self._lay_out()
        self._reveal()

    def forget(self) -> None:
        """Forget what was drawn, and the styles of the old theme."""
        super().forget()
        self._cursor_styles.clear()

    def draw_line(self, y: int) -> Strip:
        """Draw one line: the titles stay on top, rows scroll below them."""
        ink = self.ink
        width = self.size.width
        if y == 0:
            return self._header(ink, width)
        index = self.scroll_offset.y + y - 1
        if not self._rows and y == 1:
            told = "no row matches the filter" if self._all else self.empty
            return line([(f" {cut(told, width - 2)}", ink.muted)], width, ink.text)
        if index >= len(self._rows):
            return Strip.blank(width, ink.text)
        row = self._rows[index]
        on = index == self.cursor and self.has_focus
        parts: list[tuple[str, Style]] = [(" ", self._styled(ink.text, on, ink))]
        for number, (column, size) in enumerate(self._layout):
            text = cut(self._cell(column, row, size), size)
            padded = text.ljust(size) if column.align == "left" else text.rjust(size)
            tone = column.tone(row) if column.tone is not None else ""
            gap = "  " if number + 1 < len(self._layout) else ""
            style = ink.muted if text in ("n/a", "–") else ink.tone(tone)
            parts.append((padded + gap, self._styled(style, on, ink)))
        return line(parts, width, self._styled(ink.text, on, ink))

    def _styled(self, style: Style, on: bool, ink: Ink) -> Style:
        if not on:
            return style
        if (found := self._cursor_styles.get(style)) is None:
            found = self._cursor_styles[style] = style + ink.cursor
        return found

    def _header(self, ink: Ink, width: int) -> Strip:
        parts: list[tuple[str, Style]] = [(" ", ink.muted)]
        for column, size in self._layout:
            sorted_by = self.sort_column is not None and column is self.columns[self.sort_column]
            title = f"{column.title} {'▼' if self.descending else '▲'}" if sorted_by else column.title
            padded = cut(title, size).ljust(size) if column.align == "left" else cut(title, size).rjust(size)
            parts.append((padded + "  ", ink.bold if sorted_by else ink.muted))
        return line(parts, width, ink.muted)

    def watch_cursor(self) -> None:
        """Keep the cursor in sight and tell who listens."""
        self._reveal()
        self.refresh()
        if (key := self.cursor_key) is not None:
            self.post_message(self.Moved(self, key))

    def _reveal(self) -> None:
        height = self.size.height - 1
        top = self.scroll_offset.y
        if height <= 0:
            return
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, force=True)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False, force=True)

    def validate_cursor(self, cursor: int) -> int:
        """Keep the cursor on a row."""
        return max(0, min(cursor, len(self._rows) - 1))

    def on_click(self, event: events.Click) -> None:
        """Sort by a title; move to a row, and open it on the second click."""
        if event.y == 0:
            left = 1
            for column, size in self._layout:
                if left <= event.x < left + size + 2:
                    self._sort_by(self.columns.index(column))
                left += size + 2
            return
        index = self.scroll_offset.y + event.y - 1
        if index < len(self._rows):
            if index == self.cursor:
                self.action_select()
            self.cursor = index

    def _sort_by(self, index: int | None) -> None:
        if index == self.sort_column:
            self.descending = not self.descending
        self.sort_column = index
        self._arrange()

    def action_sort(self, by: int) -> None:
        """Sort by the next column that is shown."""
        shown = [self.columns.index(column) for column, _ in self._layout if column.draw is None]
        if shown:
            place = shown.index(self.sort_column) if self.sort_column in shown else -1 if by > 0 else 0
            self.sort_column = shown[(place + by) % len(shown)]
            self._arrange()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.descending = not self.descending
        self._arrange()

    def action_move(self, by: int) -> None:
        """Move the cursor by rows."""
        self.cursor += by

    def action_page(self, by: int) -> None:
        """Move the cursor by a screenful."""
        self.cursor += by * max(1, self.size.height - 2)

    def action_edge(self, index: int) -> None:
        """Move the cursor to the first or last row."""
        self.cursor = 0 if index == 0 else len(self._rows) - 1

    def action_select(self) -> None:
        """Open the row under the cursor."""
        if (key := self.cursor_key) is not None:
            self.post_message(self.Selected(self, key))
