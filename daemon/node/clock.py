"""Sees this node's clock jump: set by somebody or by NTP, or a machine that was suspended."""

from __future__ import annotations

import time
from collections.abc import Callable

JUMP_S = 1.0
"""NTP slews what is less."""


class Clock:
    """Compares the time of day with a clock that only counts."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._ahead_s = wall() - steady()

    def jumped_s(self) -> float:
        """Return by how much the time of day has jumped since the last call, 0 where it has not. Units: seconds."""
        ahead_s = self._wall() - self._steady()
        moved_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        return moved_s if abs(moved_s) >= JUMP_S else 0.0
