"""A heatmap of ranks over steps on the Line API, in half blocks: readable with 2 ranks and with 1,000.

Up to as many ranks as there are lines, each rank has a line of its own and its last value beside it. With more, a line
holds two cells above each other; where even that does not suffice, `fit` draws the slowest of each group of neighbours,
and without `fit` the map scrolls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from distui.tui.format import cut
from distui.tui.widgets.drawn import KeptLines
from distui.tui.widgets.palette import RAMP_STEPS, Ink, half_block, line
from distui.tui.widgets.scale import grown, widened

_NO_VALUE = -1
MAX_SAMPLED = 20_000
MAX_NAME = 14


class Heatmap(KeptLines, ScrollView, can_focus=True):
    """One row a rank, one column a step (or a bucket of steps); bright is slow."""

    DEFAULT_CSS = "Heatmap { height: 1fr; min-height: 3; overflow-x: hidden; scrollbar-size-vertical: 1; }"

    def __init__(
        self,
        *,
        unit: Callable[[float | None], str],
        empty: str = "no steps yet",
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._unit, self._empty = unit, empty
        self._rows: Sequence[Sequence[float]] = ()
        self._steps: Sequence[int] = ()
        self._order: list[int] = []
        self._names: list[str] = []
        self.fit = True
        """Whether neighbours are merged so that all ranks are in sight."""
        self._cells: list[list[int]] = []
        self._lasts: list[float] = []
        self._group = 1
        self._bounds = (math.nan, math.nan)
        self._stale = True
        self.num_ranks = 0
        """How many ranks the map knows."""

    def show(
        self, steps: Sequence[int], rows: Sequence[Sequence[float]], named: Mapping[int, str] | None = None
    ) -> None:
        """Take one sequence of values by rank a step, oldest first; NaN is not available.

        With `named` the values are of what has these names, place -> name, and drawn in its order.
        """
        self._steps, self._rows = steps, rows
        self.num_ranks = max((len(row) for row in rows), default=0)
        self._order = [place for place in named or () if place < self.num_ranks]
        self._names = [name for place, name in (named or {}).items() if place < self.num_ranks]
        self.num_ranks = len(self._order) or self.num_ranks
        self._stale = True
        if self.is_attached and self.size.width:
            self._prepare()
        self.changed()

    def toggle_fit(self) -> None:
        """Switch between all ranks in sight and one cell a rank."""
        self.fit = not self.fit
        self._stale = True
        self.refresh()

    def on_resize(self) -> None:
        """Draw anew at the new size."""
        self._stale = True
        self.refresh()

    def _prepare(self) -> None:
        """Bucket, group and quantise, once for each new data or size."""
        self._stale = False
        num_ranks, height = self.num_ranks, max(1, self.size.height - 1)
        self._group = max(1, math.ceil(num_ranks / (height * 2))) if self.fit and num_ranks > height else 1
        labels = self._label_width()
        columns = max(1, self.size.width - labels - 1 - (self._value_width() if self._single(height) else 0))
        buckets = _columns(self._rows, columns)
        if self._order:
            buckets = buckets[:, self._order]
        known = _sample(buckets)
        if not len(known):
            self._cells, self._lasts = [], []
            self.virtual_size = Size(self.size.width, 1)
            return
        # The slowest percent (a first step, a checkpoint) would make everything else look alike.
        low, high = float(known.min()), float(np.quantile(known, 0.985, method="lower"))
        high = max(high, low * 1.05, low + 1e-9)
        # A bound that moved with each step would give all cells another colour.
        low, high = widened(low, high)
        self._bounds = (low, high)
        worst = np.fmax.reduceat(buckets, np.arange(0, buckets.shape[1], self._group), axis=1)
        self._lasts = worst[-1].tolist()
        levels = (worst - low) * ((RAMP_STEPS - 1) / (high - low))
        levels = np.where(np.isnan(levels), _NO_VALUE, np.clip(np.nan_to_num(levels), 0, RAMP_STEPS - 1))
        # Few steps are drawn wider, so that a young run is not a sliver.
        stretch = max(1, min(4, columns // len(buckets)))
        self._cells = np.repeat(levels.astype(int), stretch, axis=0).T.tolist()
        lines = len(self._cells) if self._single(height) else math.ceil(len(self._cells) / 2)
        self.virtual_size = Size(self.size.width, lines + 1)

    def _single(self, height: int) -> bool:
        return self.num_ranks <= height

    def _label_width(self) -> int:
        last = max(0, self.num_ranks - 1)
        if self._names:
            return min(MAX_NAME, max(map(len, self._names))) + 2
        return len(self._label(last, last + 1)) + 2 if self._group == 1 else len(f"{last}-{last}") + 2

    def _value_width(self) -> int:
        return 9

    def _label(self, first: int, stop: int) -> str:
        if self._names:
            return cut(self._names[first], MAX_NAME)
        return f"rank {first}" if stop - first == 1 else f"{first}-{stop - 1}"

    def draw_line(self, y: int) -> Strip:
        """Draw one line; the scale stays on the first."""
        if self._stale:
            self._prepare()
        ink, width = self.ink, self.size.width
        if not self._cells:
            return line([(cut(f" {self._empty}", width), ink.muted)] if y == 0 else [], width, ink.text)
        if y == 0:
            return self._scale(ink, width)
        index = y - 1 + self.scroll_offset.y
        if self._single(max(1, self.size.height - 1)):
            return self._single_line(index, ink, width)
        return self._double_line(index, ink, width)

    def _scale(self, ink: Ink, width: int) -> Strip:
        low, high = self._bounds
        ramp = [(" ", half_block(_NO_VALUE, index, ink.text.bgcolor)) for index in range(0, RAMP_STEPS, 2)]
        parts: list[tuple[str, Style]] = [
            (f" {self._unit(low)} ", ink.muted),
            *ramp,
            (f" {self._unit(high)}", ink.muted),
        ]
        merged = f"  slowest of each {self._group}" if self._group > 1 else ""
        steps = f"steps {self._steps[0]:,} to {self._steps[-1]:,}" if self._steps else ""
        used = sum(len(text) for text, _ in parts) + len(merged)
        parts.append((merged, ink.muted))
        if used + len(steps) + 2 <= width:
            parts.append((steps.rjust(width - used - 1), ink.muted))
        return line(parts, width, ink.text)

    def _single_line(self, index: int, ink: Ink, width: int) -> Strip:
        if index >= len(self._cells):
            return Strip.blank(width, ink.text)
        label = f" {self._label(index, index + 1)}".ljust(self._label_width())
        parts: list[tuple[str, Style]] = [(label, ink.muted)]
        for level, run in groupby(self._cells[index]):
            size = sum(1 for _ in run)
            faint = level == _NO_VALUE
            parts.append(
                ("·" * size, ink.faint) if faint else (" " * size, half_block(_NO_VALUE, level, ink.text.bgcolor))
            )
        parts.append((self._unit(self._lasts[index]).rjust(self._value_width()), ink.text))
        return line(parts, width, ink.text)

    def _double_line(self, index: int, ink: Ink, width: int) -> Strip:
        top = index * 2
        if top >= len(self._cells):
            return Strip.blank(width, ink.text)
        first = top * self._group
        # A line of groups is called by the ranks of both its halves; of single ranks, by the upper one.
        stop = min(first + self._group * (2 if self._group > 1 else 1), self.num_ranks)
        parts: list[tuple[str, Style]] = [(f" {self._label(first, stop)}".ljust(self._label_width()), ink.muted)]
        upper = self._cells[top]
        lower = self._cells[top + 1] if top + 1 < len(self._cells) else [_NO_VALUE] * len(upper)
        background = ink.text.bgcolor
        for (above, below), run in groupby(zip(upper, lower, strict=True)):
            size = sum(1 for _ in run)
            glyph = " " if above == below == _NO_VALUE else "▀"
            parts.append((glyph * size, half_block(above, below, background)))
        return line(parts, width, ink.text)


def _columns(rows: Sequence[Sequence[float]], width: int) -> npt.NDArray[np.float64]:
    """Return at most `width` rows of values by rank: the steps as they are, or the slowest of each bucket of them.

    Shapes: [steps or buckets, ranks]; NaN is not available.
    """
    num_ranks = max((len(row) for row in rows), default=0)
    values = np.full((len(rows), num_ranks), np.nan)
    for number, row in enumerate(rows):
        values[number, : len(row)] = row
    if len(rows) <= width or not num_ranks:
        return values
    # Buckets of the same steps until there are some more of them, so that all but the newest stay as they are.
    length = grown(len(rows))
    starts = [start for number in range(width) if (start := number * length // width) < len(rows)]
    return np.fmax.reduceat(values, starts, axis=0)


def _sample(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return about `MAX_SAMPLED` of the known values, evenly taken: enough to tell a scale from."""
    flat = values.ravel()
    # An odd stride, so that it does not take the same ranks of every step.
    flat = flat[:: (len(flat) // MAX_SAMPLED) | 1]
    return flat[~np.isnan(flat)]
