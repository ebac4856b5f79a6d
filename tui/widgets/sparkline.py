"""A line of small columns, for a table cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distui.tui.widgets.outliers import CLIPPED, ceiling

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """Return the newest `width` values as columns, right-aligned; a blank is a value that is not available.

    One far above the others is a mark: the scale ends below it.
    """
    shown = list(values[-width:]) if width > 0 else []
    known = [value for value in shown if not math.isnan(value)]
    if not known:
        return " " * width
    bottom = min(known) if low is None else low
    top = ceiling(known) if high is None else high
    span = top - bottom
    # Noise of a few percent is not drawn as mountains: the scale spans at least a tenth of the value.
    floor = abs(bottom) * 0.1
    scale = (len(_LEVELS) - 1) / max(span, floor) if max(span, floor) > 0 else 0.0
    cells = []
    for value in shown:
        level = 0 if math.isnan(value) else round((value - bottom) * scale)
        if math.isnan(value):
            cells.append(" ")
        else:
            cells.append(CLIPPED if high is None and value > top else _LEVELS[max(0, min(len(_LEVELS) - 1, level))])
    return "".join(cells).rjust(width)
