"""The bounded ring between the training thread and the sender: append a tuple, drop the oldest, count the drops."""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any, NamedTuple


class RingItem(NamedTuple):
    """What was put: its number within the ring, what it is, when it happened, and its fields."""

    number: int
    kind: str
    time_s: float
    fields: tuple[Any, ...]


class Ring:
    """Any thread puts, one thread drains; nobody waits for anybody."""

    __slots__ = ("_expected", "_items", "_numbers", "memory")

    def __init__(self, capacity: int) -> None:
        """Hold at most `capacity` items."""
        self._items: deque[tuple[int, str, float, tuple[Any, ...]]] = deque(maxlen=capacity)
        self._numbers = itertools.count(1)
        self._expected = 1
        self.memory: tuple[Any, ...] | None = None
        """What the engine said last of its memory: sampled once a second, so only the newest counts."""

    def put(self, kind: str, fields: tuple[Any, ...]) -> None:
        """Append one item, which happened now; a full ring loses its oldest."""
        self._items.append((next(self._numbers), kind, time.time(), fields))

    def __len__(self) -> int:
        """Return how many items wait."""
        return len(self._items)

    def drain(self) -> tuple[list[RingItem], int]:
        """Take what is there; return it and how many were lost since the last call."""
        found, lost = [], 0
        for _ in range(len(self._items)):
            try:
                item = RingItem(*self._items.popleft())
            except IndexError:  # cannot run dry while only one thread drains; a fork may have cut it short
                break
            # Two threads may append in the other order than they took their numbers: then one counts -1.
            lost += item.number - self._expected if item.number >= self._expected else -1
            self._expected = max(self._expected, item.number + 1)
            found.append(item)
        return found, lost
