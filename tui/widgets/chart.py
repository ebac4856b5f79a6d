"""A line chart in Braille dots on the Line API: axes with units, several series, event marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.style import Style
from textual.strip import Strip

from distui.tui.format import cut, scalar
from distui.tui.widgets.drawn import DrawnWidget
from distui.tui.widgets.outliers import CLIPPED, ceiling
from distui.tui.widgets.palette import Ink, line
from distui.tui.widgets.scale import nice_step, steps_range, widened

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
_DOTS = np.array(((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80)), np.uint8)
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
    step = nice_step((high - low) / max(1, number))
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

    def draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        """Return axes, curves and marks."""
        curves = [(series.color, found) for series in self._series if len((found := _points(series))[0])]
        if not curves or width < 16 or height < 3:
            return _centred(self._empty, width, height, ink)
        ys = np.concatenate([found[1] for _, found in curves])
        low, usual = (
            0.0 if self._from_zero else float(ys.min()),
            ceiling(ys.tolist()) if self._clip else float(ys.max()),
        )
        high = usual
        if high - low <= abs(high) * 1e-9:
            pad = abs(high) * 0.1 or 1.0
            low, high = (low if self._from_zero else low - pad), high + pad
        else:
            low, high = widened(low, high)
        left, right = steps_range(
            min(float(xs[0]) for _, (xs, _) in curves), max(float(xs[-1]) for _, (xs, _) in curves)
        )
        if right <= left:
            left, right = left - 0.5, right + 0.5
        rows = height - 2
        ticks = nice_ticks(low, high, max(1, rows // 3))
        if len(ticks) < 2:
            ticks = [low, high]
        labels = {round((high - tick) / (high - low) * (rows - 1)): self._unit(tick) for tick in ticks}
        gutter = max(len(text) for text in labels.values()) + 1
        plot = width - gutter - 1
        bits = np.zeros((rows, plot), np.uint8)
        owner = np.zeros((rows, plot), np.intp)
        beyond: set[int] = set()
        for index, (_, found) in enumerate(curves):
            dots = _plot(found, (left, right, low, high), rows, plot)
            bits |= dots
            owner[dots > 0] = index
            far = (found[0][found[1] > usual] - left) * ((plot - 1) / (right - left))
            beyond.update(np.rint(far).astype(int).tolist())
        styles = [ink.of_series(color) for color, _ in curves]
        strips = []
        for row, (codes, owners) in enumerate(zip(bits.tolist(), owner.tolist(), strict=True)):
            label = labels.get(row, "")
            parts: list[tuple[str, Style]] = [(label.rjust(gutter), ink.muted), ("┤" if label else "│", ink.faint)]
            style = styles[0]
            for column, (code, series) in enumerate(zip(codes, owners, strict=True)):
                if row == 0 and column in beyond:
                    parts.append((CLIPPED, ink.tone("warn")))
                elif code:
                    style = styles[series]
                    parts.append((chr(0x2800 + code), style))
                else:
                    # A blank has no colour of its own: in its neighbour's it is no change of style.
                    parts.append(("┈", ink.faint) if label else (" ", style))
            strips.append(line(parts, width, ink.text))
        strips.append(self._axis(gutter, plot, left, right, ink, width))
        strips.append(self._x_labels(gutter, plot, left, right, ink, width))
        return strips

    def _axis(self, gutter: int, plot: int, left: float, right: float, ink: Ink, width: int) -> Strip:
        cells: list[tuple[str, Style]] = [("─", ink.faint)] * plot
        for tick in nice_ticks(left, right, max(2, plot // 16)):
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
        ticks = [tick for tick in nice_ticks(left, right, max(2, plot // 16)) if tick == int(tick)]
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


def _points(series: Series) -> Points:
    """Return a curve's known points in the order of x."""
    xs, ys = np.asarray(series.xs, np.float64), np.asarray(series.ys, np.float64)
    known = np.isfinite(ys)
    xs, ys = xs[known], ys[known]
    if np.any(xs[1:] < xs[:-1]):
        order = np.argsort(xs, kind="stable")
        xs, ys = xs[order], ys[order]
    return xs, ys


def _plot(points: Points, bounds: tuple[float, float, float, float], rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Return a curve's dots as the bits of each cell: straight lines between points, and where points are dense each
    dot column's whole range. Shape: [rows, columns].
    """
    left, right, low, high = bounds
    wide, tall = columns * 2 - 1, rows * 4 - 1
    xs, ys = (points[0] - left) * (wide / (right - left)), (high - points[1]) * (tall / (high - low))
    first, last = round(float(xs[0])), round(float(xs[-1]))
    places = np.arange(first, last + 1)
    edges = np.interp(np.arange(first, last + 2) - 0.5, xs, ys)
    top, bottom = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    of_point = np.rint(xs).astype(np.intp) - first
    np.minimum.at(top, of_point, ys)
    np.maximum.at(bottom, of_point, ys)
    dots = np.zeros((rows * 4, columns * 2), bool)
    lines = np.arange(rows * 4)[:, None]
    dots[:, places] = (lines >= np.clip(np.rint(top), 0, tall)) & (lines <= np.clip(np.rint(bottom), 0, tall))
    found: npt.NDArray[np.uint8] = np.einsum("rdcs,ds->rc", dots.reshape(rows, 4, columns, 2), _DOTS)
    return found


def _centred(text: str, width: int, height: int, ink: Ink) -> list[Strip]:
    blank = Strip.blank(width, ink.text)
    strips = [blank] * height
    if height:
        strips[(height - 1) // 2] = line([(cut(text, width).center(width), ink.muted)], width, ink.text)
    return strips
