"""Where a scale ends: a first step or a checkpoint that took ten times as long must not flatten all the others."""

from __future__ import annotations

from collections.abc import Sequence

SHARE = 0.95
FAR = 2.0
"""What is above so many times the 95th percentile is far out."""
MIN_VALUES = 8
CLIPPED = "▲"
"""Stands where a value goes on above the scale."""


def ceiling(values: Sequence[float]) -> float:
    """Return where a scale of `values` (finite, not empty) ends: with the largest that is not far out."""
    if len(values) < MIN_VALUES:
        return max(values)
    ordered = sorted(values)
    most, usual = ordered[-1], ordered[int((len(ordered) - 1) * SHARE)]
    return most if usual <= 0 else max(value for value in ordered if value <= FAR * usual)
