"""Colours of the Line-API widgets: few, cached, safe for colour-blind eyes, and never the only sign of anything.

The series are Okabe and Ito's set, lightened for dark themes and darkened for light ones; the ramp is cividis in 24
steps, whose lightness rises evenly, so that it also reads in grey (NO_COLOR). Source: Okabe & Ito, Color Universal
Design, 2008; Nunez, Anderton & Renslow, PLOS ONE 13(7), 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

FILLS = ("█", "▓", "▒", "░", "▚", "╱", "∙")
"""One pattern a category, so that a bar reads without colour."""

_SERIES_DARK = ("#56b4e9", "#e69f00", "#2fbf94", "#cc79a7", "#f0e442", "#e8743b", "#8a8f98")
_SERIES_LIGHT = ("#0072b2", "#b35c00", "#00795a", "#a34a7d", "#7a6a00", "#b8400e", "#6c717a")
_TONES_DARK = {"good": "#2fbf94", "warn": "#e69f00", "bad": "#ff7a59", "calm": "#56b4e9", "accent": "#56b4e9"}
_TONES_LIGHT = {"good": "#00795a", "warn": "#a05a00", "bad": "#b8320e", "calm": "#0072b2", "accent": "#0072b2"}
_CIVIDIS = (
    (0.0, (0, 34, 78)),
    (0.13, (18, 53, 112)),
    (0.25, (59, 73, 108)),
    (0.38, (87, 93, 109)),
    (0.5, (112, 113, 115)),
    (0.63, (138, 134, 120)),
    (0.75, (165, 156, 116)),
    (0.88, (195, 179, 105)),
    (1.0, (254, 232, 56)),
)
RAMP_STEPS = 24


def _ramp() -> tuple[str, ...]:
    colors = []
    for step in range(RAMP_STEPS):
        place = step / (RAMP_STEPS - 1)
        for (low, first), (high, second) in pairwise(_CIVIDIS):
            if place <= high:
                share = (place - low) / (high - low)
                mixed = [round(a + (b - a) * share) for a, b in zip(first, second, strict=True)]
                colors.append("#{:02x}{:02x}{:02x}".format(*mixed))
                break
    return tuple(colors)


RAMP = _ramp()


def _blend(color: Color | None, other: Color | None, share: float) -> Color | None:
    if color is None or other is None or color.triplet is None or other.triplet is None:
        return color
    mixed = (round(a + (b - a) * share) for a, b in zip(color.triplet, other.triplet, strict=True))
    return Color.from_rgb(*mixed)


class Ink:
    """Every style that a widget draws with, on its own background."""

    def __init__(self, base: Style, dark: bool) -> None:
        background = base.bgcolor
        self.text = Style(color=base.color, bgcolor=background)
        self.bold = self.text + Style(bold=True)
        muted = _blend(base.color, background, 0.45)
        self.muted = Style(color=muted, bgcolor=background, dim=muted is base.color)
        self.faint = Style(color=_blend(base.color, background, 0.75), bgcolor=background, dim=muted is base.color)
        self.series = tuple(Style.parse(c) + _on(background) for c in (_SERIES_DARK if dark else _SERIES_LIGHT))
        tones = _TONES_DARK if dark else _TONES_LIGHT
        self._tones = {name: Style.parse(color) + _on(background) for name, color in tones.items()}
        self._tones |= {"": self.text, "muted": self.muted, "bold": self.bold, "faint": self.faint}
        self.cursor = Style(bgcolor=_blend(background, Color.parse(tones["accent"]), 0.32), bold=True)
        if background is None or background.triplet is None:
            self.cursor = Style(reverse=True)

    def tone(self, name: str) -> Style:
        """Return the style of a tone: good, warn, bad, calm, accent, muted, faint, bold; "" is plain text."""
        return self._tones[name]

    def of_series(self, index: int) -> Style:
        """Return the style of the index-th series or category."""
        return self.series[index % len(self.series)]


def _on(background: Color | None) -> Style:
    return Style(bgcolor=background)


@lru_cache(maxsize=64)
def _ink(base: Style, dark: bool) -> Ink:
    return Ink(base, dark)


def ink_of(widget: Widget) -> Ink:
    """Return the widget's styles under the present theme."""
    base = widget.rich_style
    return _ink(Style(color=base.color, bgcolor=base.bgcolor), widget.app.current_theme.dark)


@lru_cache(maxsize=RAMP_STEPS * RAMP_STEPS * 2)
def half_block(upper: int, lower: int, background: Color | None) -> Style:
    """Return the style of an upper half block over a lower one; -1 is "nothing there"."""
    top = Color.parse(RAMP[upper]) if upper >= 0 else background
    return Style(color=top, bgcolor=Color.parse(RAMP[lower]) if lower >= 0 else background)


def fill_of(index: int) -> str:
    """Return the pattern of the index-th category."""
    return FILLS[index % len(FILLS)]


def line(parts: Sequence[tuple[str, Style]], width: int, blank: Style) -> Strip:
    """Return parts of text as one strip of exactly `width` cells; neighbours of one style are merged."""
    segments: list[Segment] = []
    for text, style in parts:
        if not text:
            continue
        if segments and segments[-1].style is style:
            segments[-1] = Segment(segments[-1].text + text, style)
        else:
            segments.append(Segment(text, style))
    return Strip(segments).adjust_cell_length(width, blank)
