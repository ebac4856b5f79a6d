"""Stacked bars on the Line API: what a whole is made of, each category with its own pattern, colour and number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import overload

import numpy as np
import numpy.typing as npt
from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from distui.tui.format import cut, percent
from distui.tui.widgets.drawn import DrawnWidget, KeptLines
from distui.tui.widgets.palette import Ink, fill_of, line
from distui.tui.widgets.scale import grown

_NOTHING = -1


@dataclass(frozen=True)
class Bar:
    """One bar. `scale` is the value of its full width, `mark` a value drawn as a line across it (the plan)."""

    label: str
    parts: Sequence[tuple[str, float]]
    text: str = ""
    scale: float | None = None
    mark: float | None = None


class MadeBars(Sequence[Bar]):
    """Bars that are made when they are drawn, for thousands of them; `names` are all their categories."""

    def __init__(self, num: int, make: Callable[[int], Bar], names: Sequence[str]) -> None:
        self._num, self._make, self.names = num, make, names

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> Bar: ...

    @overload
    def __getitem__(self, index: slice) -> list[Bar]: ...

    def __getitem__(self, index: int | slice) -> Bar | list[Bar]:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(self._num))]
        return self._make(range(self._num)[index])


class StackedBars(KeptLines, ScrollView, can_focus=False):
    """Bars under each other with a legend below; categories keep their pattern over all bars."""

    DEFAULT_CSS = "StackedBars { height: auto; overflow-x: hidden; scrollbar-size-vertical: 1; }"

    def __init__(
        self,
        *,
        unit: Callable[[float | None], str],
        legend: bool = True,
        legend_first: bool = False,
        shares: bool = False,
        thickness: int = 1,
        empty: str = "n/a",
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._unit, self._shares, self._thickness = unit, shares, thickness
        self._legend, self._legend_first = legend, legend_first
        self._empty = empty
        self._bars: Sequence[Bar] = ()
        self._label_width = self._text_width = 0
        self._names: list[str] = []
        self._values: dict[str, float] | None = None
        self._mark_name = ""
        self.brief = False
        """Whether the legend is one line: the largest categories with their shares."""
        self._head: list[Strip] | None = None
        """The legend, or what stands in place of bars; None where all must be drawn anew."""
        self._drawn: dict[int, list[Strip]] = {}
        """Lines of the bars that were in sight, by their number."""

    def show(
        self, bars: Sequence[Bar], values: dict[str, float] | None = None, mark_name: str = "", empty: str | None = None
    ) -> None:
        """Take new bars. `values` are the numbers of the legend: by default the first bar's."""
        if isinstance(bars, MadeBars):
            self._bars, names = bars, dict.fromkeys(bars.names)
        else:
            self._bars = [bar for bar in bars if bar.parts]
            names = dict.fromkeys(name for bar in self._bars for name, _ in bar.parts)
        stride = max(1, len(self._bars) // 64)
        seen = [*self._bars[::stride], *self._bars[-1:]]
        self._label_width = max((len(bar.label) for bar in seen), default=0)
        # Among those that were not looked at one may have a digit more.
        self._text_width = max((len(bar.text) for bar in seen), default=0) + (stride > 1)
        # Categories keep their pattern while others come and go.
        self._names = [name for name in self._names if name in names]
        self._names += [name for name in names if name not in self._names]
        self._names.sort(key=list(names).index)
        self._values = values if values is not None else dict(self._bars[0].parts) if self._bars else {}
        self._mark_name = mark_name
        self._empty = empty or self._empty
        self._redraw()

    def _redraw(self) -> None:
        self._head = None
        self._drawn.clear()
        if self.is_attached and self.size.width:
            num_lines = self._num_lines(self.size.width)
            if self.virtual_size.height != num_lines or self.virtual_size.width != self.size.width:
                self.virtual_size = Size(self.size.width, num_lines)
                self.refresh(layout=True)
        self.changed()

    def forget(self) -> None:
        """Forget what was drawn."""
        super().forget()
        self._head = None
        self._drawn.clear()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the lines that bars and legend need."""
        return self._num_lines(width) if width else 1

    def _num_lines(self, width: int) -> int:
        return len(self._draw_head(width, self.ink)) + len(self._bars) * self._thickness

    def on_resize(self) -> None:
        """Draw anew at the new size."""
        self._redraw()

    def draw_line(self, y: int) -> Strip:
        """Draw one line; of a thousand bars only those in sight are drawn."""
        width, ink = self.size.width, self.ink
        if self._head is None:
            self._head = self._draw_head(width, ink)
        index = y + self.scroll_offset.y
        bars_first = self._bars and not self._legend_first
        in_bars = index if bars_first else index - len(self._head)
        in_head = index - len(self._bars) * self._thickness if bars_first else index
        if 0 <= in_head < len(self._head):
            return self._head[in_head]
        number, part = divmod(in_bars, self._thickness)
        if not 0 <= number < len(self._bars):
            return Strip.blank(width, ink.text)
        if number not in self._drawn:
            self._drawn[number] = self._draw_bar(self._bars[number], width, ink)
        return self._drawn[number][part]

    def _draw_head(self, width: int, ink: Ink) -> list[Strip]:
        if not self._bars:
            return [line([(f" {cut(self._empty, width - 2)}", ink.muted)], width, ink.text)]
        return self._legend_lines(width, ink) if self._legend else []

    def _draw_bar(self, bar: Bar, width: int, ink: Ink) -> list[Strip]:
        labels, texts = self._label_width, self._text_width
        room = width - labels - texts - 2 - bool(labels) - bool(texts)
        cells = self._cells(bar, max(4, room), ink)
        strips = []
        for number in range(self._thickness):
            first = number == 0
            head = f" {bar.label.ljust(labels) if first else ' ' * labels}" + (" " if labels else "")
            tail = f" {bar.text.rjust(texts)}" if texts and first else ""
            strips.append(line([(head, ink.text), *cells, (tail, ink.text)], width, ink.text))
        return strips

    def _cells(self, bar: Bar, room: int, ink: Ink) -> list[tuple[str, Style]]:
        total = sum(size for _, size in bar.parts)
        scale = bar.scale if bar.scale and bar.scale >= total else total
        cells: list[tuple[str, Style]] = []
        reached = 0.0
        for name, size in bar.parts:
            reached += size
            stop = round(reached / scale * room) if scale > 0 else 0
            index = self._names.index(name)
            cells += [(fill_of(index), ink.of_series(index))] * (stop - len(cells))
        cells += [("·", ink.faint)] * (room - len(cells))
        if bar.mark is not None and scale > 0:
            cells[max(0, min(room - 1, round(bar.mark / scale * room)))] = ("┃", ink.bold)
        return cells

    def _legend_lines(self, width: int, ink: Ink) -> list[Strip]:
        """Return the legend, wrapped between entries, never within one."""
        values = self._values or {}
        total = sum(values.values())
        if self.brief:
            return [self._brief_legend(values, total, width, ink)]
        lines: list[list[tuple[str, Style]]] = [[]]
        used = 0
        entries = [
            (fill_of(n), ink.of_series(n), name, self._number(values.get(name), total))
            for n, name in enumerate(self._names)
        ]
        if self._mark_name:
            entries.append(("┃", ink.bold, self._mark_name, ""))
        for glyph, style, name, number in entries:
            size = 1 + 2 + len(name) + len(number) + bool(number) + 1
            if lines[-1] and used + size > width:
                lines.append([])
                used = 0
            lines[-1] += [
                (" ", ink.text),
                (glyph, style),
                (f" {name}", ink.muted),
                (f" {number} " if number else " ", ink.text),
            ]
            used += size
        return [line(parts, width, ink.text) for parts in lines]

    def _brief_legend(self, values: dict[str, float], total: float, width: int, ink: Ink) -> Strip:
        parts: list[tuple[str, Style]] = []
        used = 0
        for name in sorted(self._names, key=lambda name: -(values.get(name) or 0.0)):
            index = self._names.index(name)
            text = f" {name} {percent(values[name] / total) if total and name in values else 'n/a'} "
            if used + 2 + len(text) > width:
                break
            parts += [(" ", ink.text), (fill_of(index), ink.of_series(index)), (text, ink.muted)]
            used += 2 + len(text)
        return line(parts, width, ink.text)

    def _number(self, value: float | None, total: float) -> str:
        if value is None:
            return "n/a"
        return (
            f"{self._unit(value)} {percent(value / total) if total else ''}".rstrip()
            if self._shares
            else self._unit(value)
        )


class StackedColumns(DrawnWidget):
    """Shares over time: each column of cells is a bucket of steps, cut into categories from the bottom up."""

    DEFAULT_CSS = "StackedColumns { height: 1fr; min-height: 4; }"

    def __init__(self, *, empty: str = "n/a", id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._empty = empty
        self._columns: Sequence[Sequence[float]] = ()

    def show(self, columns: Sequence[Sequence[float]]) -> None:
        """Take one sequence of values a category, all over the same steps; NaN is not available."""
        self._columns = columns
        self.redraw()

    def draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        """Return the columns and their axis."""
        gutter = 6
        plot = max(1, width - gutter - 1)
        shares = _buckets(self._columns, plot)
        if not np.isfinite(shares).any() or height < 2:
            strips = [Strip.blank(width, ink.text)] * height
            if height:
                strips[(height - 1) // 2] = line([(cut(self._empty, width).center(width), ink.muted)], width, ink.text)
            return strips
        # The category at the middle of each cell: how many upper edges lie below it. Shape: [height, buckets].
        middles = (height - 0.5 - np.arange(height)) / height
        found = (shares[None, :-1, :] < middles[:, None, None]).sum(axis=1)
        found[:, ~np.isfinite(shares[0])] = _NOTHING
        strips = []
        for row, cells in enumerate(found.tolist()):
            label = {0: "100%", height - 1: "0%", (height - 1) // 2: "50%" if height >= 7 else ""}.get(row, "")
            parts: list[tuple[str, Style]] = [
                (label.rjust(gutter - 1) + " ", ink.muted),
                ("┤" if label else "│", ink.faint),
            ]
            for index, run in groupby(cells):
                size = sum(1 for _ in run)
                nothing = index == _NOTHING
                parts.append((" " * size, ink.text) if nothing else (fill_of(index) * size, ink.of_series(index)))
            strips.append(line(parts, width, ink.text))
        return strips


def _buckets(columns: Sequence[Sequence[float]], width: int) -> npt.NDArray[np.float64]:
    """Return the cumulative shares of each of `width` buckets; NaN where nothing was measured.

    Buckets are of the same steps until there are some more of these, so that only the newest one changes.
    Shape: [categories, buckets].
    """
    length = len(columns[0]) if columns else 0
    if not length:
        return np.full((1, width), math.nan)
    room = grown(length) if length > width else length
    starts = np.arange(width) * room // width
    starts = starts[starts < length]
    sums = np.add.reduceat(np.nan_to_num(np.asarray(columns, np.float64)), starts, axis=1)
    if length < width:  # a step has several buckets, and each of them is that step
        sums = np.nan_to_num(np.asarray(columns, np.float64))[:, starts]
    total = sums.sum(axis=0)
    shares = np.full((len(columns), width), math.nan)
    shares[:, : len(starts)] = np.where(total > 0, sums.cumsum(axis=0) / np.where(total > 0, total, 1.0), math.nan)
    return shares
