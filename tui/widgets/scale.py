"""Scales that stay while values come in: their ends are rounded outwards, so that a new step moves no other.

A scale that ended with the newest value would be another at each step, and all of the picture with it.
"""

from __future__ import annotations

import math


def nice_step(raw: float) -> float:
    """Return the least of 1, 2 or 5 times a power of ten that is not below `raw`, which is positive and finite."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)


def widened(low: float, high: float, parts: int = 24) -> tuple[float, float]:
    """Return the range with its ends rounded outwards, each by less than a `parts`-th or two of it."""
    if high <= low:
        return low, high
    step = nice_step((high - low) / parts)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def stride_of(length: float) -> int:
    """Return in what strides the end of a scale of `length` steps moves: a 32nd to a 64th of it, at least one step."""
    return 1 << max(0, int(length).bit_length() - 6)


def grown(length: int) -> int:
    """Return for how many steps there is to be room, where there are `length`."""
    stride = stride_of(length)
    return -(-length // stride) * stride


def steps_range(first: float, last: float) -> tuple[float, float]:
    """Return the range of an axis of steps from `first` to `last`."""
    stride = stride_of(last - first)
    return math.floor(first / stride) * stride, math.ceil(last / stride) * stride
