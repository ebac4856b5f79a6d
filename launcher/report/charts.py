"""Charts as SVG: lines, stacked areas, bars, and the heatmap of ranks over steps; its colours suit the colour-blind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 200
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 28, 24
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
"""Okabe and Ito's palette."""
HEAT = ("#fde725", "#90d743", "#35b779", "#21918c", "#31688e", "#443983", "#440154")
"""Viridis, light to dark: reads the same in grey."""
MAX_POINTS = 800

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished drawing: the inside of an `svg` element, and its size in pixels."""

    body: str
    height: int = HEIGHT
    width: int = WIDTH

    def svg(self, y: int | None = None) -> str:
        """Return the element; with `y` as a part of a larger one, so far from its top."""
        place = "" if y is None else f' y="{y}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}"{place} '
            f'viewBox="0 0 {self.width} {self.height}" font-family="system-ui,sans-serif" font-size="11" '
            f'role="img">{self.body}</svg>'
        )


def text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    """Return a line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="currentColor">{escape(words)}</text>'


def finite(points: Points) -> list[tuple[float, float]]:
    """Return the points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MAX_POINTS` points that keep every peak: the lowest and the highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _limits(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = (0.0 if from_zero else min(values)), max(values)
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return low, high


class _Frame:
    """The axes of a chart, and where a value lies between them."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], y_words: Callable[[float], str]) -> None:
        self._x, self._y, self._words = x, y, y_words

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def x(self, x: float) -> float:
        low, high = self._x
        return LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, y: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, title: str) -> str:
        parts = [text(LEFT, 14, title, weight="bold")]
        for share in (0.0, 0.5, 1.0):
            value = self._y[0] + share * (self._y[1] - self._y[0])
            height = self.y(value)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="currentColor" '
                'stroke-opacity="0.15"/>'
            )
            parts.append(text(LEFT - 6, height + 4, self._words(value), anchor="end"))
        parts.append(text(LEFT, HEIGHT - 6, f"step {self._x[0]:,.0f}"))
        parts.append(text(WIDTH - RIGHT, HEIGHT - 6, f"{self._x[1]:,.0f}", anchor="end"))
        return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    parts, x = [], WIDTH - RIGHT
    for index in range(len(names) - 1, -1, -1):
        x -= 7 * len(names[index]) + 8
        parts.append(text(x, 14, names[index]))
        x -= 14
        parts.append(f'<rect x="{x}" y="5" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
    return "".join(parts)


def nothing(title: str, why: str) -> Chart:
    """Return a chart that says why it is empty."""
    return Chart(text(LEFT, 14, title, weight="bold") + text(LEFT, 34, f"n/a: {why}"), 44)


def lines(
    title: str, series: dict[str, Points], y_words: Callable[[float], str], marks: Sequence[tuple[float, str]] = ()
) -> Chart:
    """Return one line a series over the steps; `marks` are steps at which something happened."""
    drawn = {name: thin(kept) for name, points in series.items() if (kept := finite(points))}
    if not drawn:
        return nothing(title, "no rank has sent it")
    xs = [x for points in drawn.values() for x, _ in points]
    frame = _Frame((min(xs), max(xs)), _limits([y for points in drawn.values() for _, y in points], False), y_words)
    parts = [frame.axes(title)]
    for step, words in marks:
        if min(xs) <= step <= max(xs):
            x = frame.x(step)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#d55e00" '
                f'stroke-dasharray="3 3"><title>{escape(words)}</title></line>'
            )
    for index, points in enumerate(drawn.values()):
        path = " ".join(frame.at(x, y) for x, y in points)
        colour = COLOURS[index % len(COLOURS)]
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    if len(drawn) > 1:
        parts.append(_legend(list(drawn)))
    return Chart("".join(parts))


def stacked(
    title: str, xs: Sequence[float], layers: dict[str, Sequence[float]], y_words: Callable[[float], str]
) -> Chart:
    """Return layers on top of each other over the steps."""
    if not xs or not any(any(layer) for layer in layers.values()):
        return nothing(title, "no rank has sent it")
    stretch = math.ceil(len(xs) / MAX_POINTS)
    at = [xs[start] for start in range(0, len(xs), stretch)]
    means = {
        name: [
            math.fsum(layer[start : start + stretch]) / len(layer[start : start + stretch])
            for start in range(0, len(xs), stretch)
        ]
        for name, layer in layers.items()
    }
    below = [0.0] * len(at)
    areas = []
    for name in layers:
        top = [low + value for low, value in zip(below, means[name], strict=True)]
        areas.append((list(below), top))
        below = top
    frame = _Frame((at[0], at[-1]), _limits(below, True), y_words)
    parts = [frame.axes(title)]
    for index, (low, high) in enumerate(areas):
        there = [frame.at(x, y) for x, y in zip(at, high, strict=True)]
        back = [frame.at(x, y) for x, y in zip(reversed(at), reversed(low), strict=True)]
        parts.append(
            f'<polygon points="{" ".join(there + back)}" fill="{COLOURS[index % len(COLOURS)]}" fill-opacity="0.85"/>'
        )
    parts.append(_legend(list(layers)))
    return Chart("".join(parts))


def bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], words: Callable[[float], str]) -> Chart:
    """Return one bar a row, its parts beside each other; the longest takes the whole width."""
    longest = max((math.fsum(parts.values()) for _, parts in rows), default=0.0)
    if not longest:
        return nothing(title, "no rank has sent it")
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    drawn = [text(LEFT, 14, title, weight="bold"), _legend(names)]
    y, room = TOP, WIDTH - LEFT - RIGHT - 70
    for label, values in rows:
        x = float(LEFT)
        drawn.append(text(LEFT - 6, y + 11, label, anchor="end"))
        for name, value in values.items():
            width = value / longest * room
            colour = COLOURS[names.index(name) % len(COLOURS)]
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="14" fill="{colour}">'
                f"<title>{escape(f'{name}: {words(value)}')}</title></rect>"
            )
            x += width
        drawn.append(text(x + 5, y + 11, words(math.fsum(values.values()))))
        y += 20
    return Chart("".join(drawn), y + 6)


def heatmap(
    title: str, rows: Sequence[Sequence[float]], first_step: float, last_step: float, words: Callable[[float], str]
) -> Chart:
    """Return rows (ranks) over columns (steps), the darker the slower; above the 98th percentile all is dark."""
    values = sorted(value for row in rows for value in row if math.isfinite(value))
    if not values:
        return nothing(title, "no rank has sent it")
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    columns = max(len(row) for row in rows)
    room = WIDTH - LEFT - RIGHT
    width, height = room / columns, max(2.0, min(14.0, 240 / len(rows)))
    drawn = [text(LEFT, 14, title, weight="bold")]
    for index, row in enumerate(rows):
        y = TOP + index * height
        if height >= 10 or index in (0, len(rows) - 1):
            drawn.append(text(LEFT - 6, y + min(11.0, height), f"rank {index}", anchor="end"))
        start, level = 0, -1
        for column in range(columns + 1):
            value = row[column] if column < len(row) else math.nan
            here = _level(value, low, high) if column < columns else -2
            if here != level:  # equal neighbours are one rectangle
                if level >= 0:
                    size = f'width="{(column - start) * width + 0.3:.1f}" height="{height:.1f}"'
                    drawn.append(f'<rect x="{LEFT + start * width:.1f}" y="{y:.1f}" {size} fill="{HEAT[level]}"/>')
                start, level = column, here
    bottom = TOP + len(rows) * height + 14
    drawn.append(text(LEFT, bottom, f"step {first_step:,.0f}"))
    drawn.append(
        text(WIDTH - RIGHT, bottom, f"{last_step:,.0f}   light {words(low)}, dark {words(high)} and more", anchor="end")
    )
    return Chart("".join(drawn), int(bottom + 8))


def _level(value: float, low: float, high: float) -> int:
    if not math.isfinite(value):
        return -1
    share = (value - low) / (high - low) if high > low else 0.0
    return max(0, min(len(HEAT) - 1, int(share * len(HEAT))))
