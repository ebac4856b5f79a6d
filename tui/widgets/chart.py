"""A line chart in Braille dots on the Line API: axes with units, several series, event marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.style import Style
from textual.strip import Strip

from distui.tui.format import cut, scalar
from distui.tui.widgets.drawn import DrawnWidget
from distui.tui.widgets.outliers import CLIPPED, ceiling
from distui.tui.widgets.palette import Ink, line

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARK_GLYPHS = ("◆", "▲", "✗")
"""Of an event's level: information, warning, error."""
MARK_TONES = ("calm", "warn", "bad")


@dataclass(frozen=True)
class Series:
    """A named curve; NaN breaks it. `color` counts in the palette's series."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0


@dataclass(frozen=True)
class Mark:
    """An event at x: 0 information, 1 warning, 2 error."""

    x: float
    name: str
    level: int = 0


def nice_ticks(low: float, high: float, number: int) -> list[float]:
    """Return about `number` round values within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or number < 1:
        return [low]
    raw = (high - low) / max(1, number)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


class LineChart(DrawnWidget):
    """Draws what `show` gave it; redrawn only when data, size or theme change."""

    DEFAULT_CSS = "LineChart { height: 1fr; min-height: 4; }"

    def __init__(
        self,
        *,
        unit: Callable[[float | None], str] = scalar,
        from_zero: bool = False,
        clip: bool = False,
        x_title: str = "step",
        empty: str = "no steps yet",
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        """Draw with `unit` on the axis; `clip` ends it above the usual values and marks what goes beyond."""
        super().__init__(id=id, classes=classes)
        self._unit, self._from_zero, self._x_title, self._empty = unit, from_zero, x_title, empty
        self._clip = clip
        self._series: list[Series] = []
        self._marks: list[Mark] = []

    def show(self, series: Sequence[Series], marks: Sequence[Mark] = (), empty: str | None = None) -> None:
        """Take new curves and event marks; `empty` is said where no curve has a point."""
        self._series, self._marks = list(series), list(marks)
        self._empty = empty or self._empty
        self.redraw()

    def _draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        points = [
            (series, [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)])
            for series in self._series
        ]
        points = [(series, found) for series, found in points if found]
        if not points or width < 16 or height < 3:
            return _centred(self._empty, width, height, ink)
        ys = [y for _, found in points for _, y in found]
        xs = [x for _, found in points for x, _ in found]
        low, high = (0.0 if self._from_zero else min(ys)), ceiling(ys) if self._clip else max(ys)
        if high - low <= abs(high) * 1e-9:
            pad = abs(high) * 0.1 or 1.0
            low, high = (low if self._from_zero else low - pad), high + pad
        left, right = min(xs), max(xs)
        if right <= left:
            left, right = left - 0.5, right + 0.5
        rows = height - 2
        ticks = nice_ticks(low, high, max(1, rows // 3))
        if len(ticks) < 2:
            ticks = [low, high]
        labels = {round((high - tick) / (high - low) * (rows - 1)): self._unit(tick) for tick in ticks}
        gutter = max(len(text) for text in labels.values()) + 1
        plot = width - gutter - 1
        grid = [[0] * plot for _ in range(rows)]
        owner = [[-1] * plot for _ in range(rows)]
        for index, (_, found) in enumerate(points):
            _plot(found, (left, right, low, high), grid, owner, index)
        styles = [ink.of_series(series.color) for series, _ in points]
        beyond = {round((x - left) / (right - left) * (plot - 1)) for _, found in points for x, y in found if y > high}
        strips = []
        for row in range(rows):
            label = labels.get(row, "")
            parts: list[tuple[str, Style]] = [(label.rjust(gutter), ink.muted), ("┤" if label else "│", ink.faint)]
            for column, (bits, series) in enumerate(zip(grid[row], owner[row], strict=True)):
                if row == 0 and column in beyond:
                    parts.append((CLIPPED, ink.tone("warn")))
                elif bits:
                    parts.append((chr(0x2800 + bits), styles[series]))
                else:
                    parts.append(("┈" if label else " ", ink.faint))
            strips.append(line(parts, width, ink.text))
        strips.append(self._axis(gutter, plot, left, right, ink, width))
        strips.append(self._x_labels(gutter, plot, left, right, ink, width))
        return strips

    def _axis(self, gutter: int, plot: int, left: float, right: float, ink: Ink, width: int) -> Strip:
        cells: list[tuple[str, Style]] = [("─", ink.faint)] * plot
        for tick in nice_ticks(left, right, max(1, plot // 16)):
            cells[min(plot - 1, round((tick - left) / (right - left) * (plot - 1)))] = ("┬", ink.faint)
        for mark in self._marks:
            if left <= mark.x <= right:
                level = max(0, min(mark.level, len(MARK_GLYPHS) - 1))
                place = round((mark.x - left) / (right - left) * (plot - 1))
                cells[place] = (MARK_GLYPHS[level], ink.tone(MARK_TONES[level]))
        return line([(" " * gutter + "└", ink.faint), *cells], width, ink.text)

    def _x_labels(self, gutter: int, plot: int, left: float, right: float, ink: Ink, width: int) -> Strip:
        text = [" "] * width
        title = self._x_title
        ticks = [tick for tick in nice_ticks(left, right, max(1, plot // 16)) if tick == int(tick)]
        free_from = 0
        stop = width - len(title) - 1
        for tick in ticks:
            label = f"{int(tick):,}"
            middle = gutter + 1 + round((tick - left) / (right - left) * (plot - 1))
            start = max(gutter, middle - len(label) // 2)
            if start >= free_from and start + len(label) < stop:
                text[start : start + len(label)] = label
                free_from = start + len(label) + 2
        text[stop + 1 :] = title
        return line([("".join(text), ink.muted)], width, ink.text)


def _plot(
    points: list[tuple[float, float]],
    bounds: tuple[float, float, float, float],
    grid: list[list[int]],
    owner: list[list[int]],
    index: int,
) -> None:
    """Set the dots of one curve: straight lines between points, or each dot column's range where points are dense."""
    left, right, low, high = bounds
    rows, columns = len(grid), len(grid[0])
    wide, tall = columns * 2 - 1, rows * 4 - 1
    x_scale, y_scale = wide / (right - left), tall / (high - low)
    ranges: dict[int, tuple[int, int]] = {}
    previous: tuple[int, int] | None = None
    for x, y in points:
        at = (round((x - left) * x_scale), max(0, min(tall, round((high - y) * y_scale))))
        for column, top, bottom in _between(previous, at):
            known = ranges.get(column)
            ranges[column] = (min(top, known[0]), max(bottom, known[1])) if known else (top, bottom)
        previous = at
    for column, (top, bottom) in ranges.items():
        for dot in range(top, bottom + 1):
            row, cell = dot // 4, column // 2
            grid[row][cell] |= _DOTS[dot % 4][column % 2]
            owner[row][cell] = index


def _between(start: tuple[int, int] | None, end: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Return (dot column, top, bottom) of the line from start to end."""
    if start is None:
        return [(end[0], end[1], end[1])]
    (x0, y0), (x1, y1) = start, end
    if x1 <= x0:
        return [(x1, min(y0, y1), max(y0, y1))]
    slope = (y1 - y0) / (x1 - x0)
    found = []
    for x in range(x0, x1 + 1):
        a = y0 + slope * max(0.0, x - x0 - 0.5)
        b = y0 + slope * min(float(x1 - x0), x - x0 + 0.5)
        found.append((x, round(min(a, b)), round(max(a, b))))
    return found


def _centred(text: str, width: int, height: int, ink: Ink) -> list[Strip]:
    blank = Strip.blank(width, ink.text)
    strips = [blank] * height
    if height:
        strips[(height - 1) // 2] = line([(cut(text, width).center(width), ink.muted)], width, ink.text)
    return strips
