"""Histories of bounded memory: the newest items whole, older ones thinned evenly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class History(Generic[T]):
    """Items in the order of arrival, each with a number that grows by one; a reader asks for what came after one."""

    def __init__(self, num_recent: int, num_older: int, thin: Callable[[T], T] | None = None) -> None:
        """Keep `num_recent` items whole, and of those before at most `num_older`, each passed through `thin`."""
        self._recent: deque[T] = deque()
        self._older: list[T] = []
        self._num_recent, self._num_older, self._thin = num_recent, num_older, thin
        self._stride = 1
        self._num_aged = 0
        self.head = 0
        """The number of the newest item: how many there have been."""

    def append(self, item: T) -> None:
        """Add the newest item."""
        self._recent.append(item)
        self.head += 1
        if len(self._recent) > self._num_recent:
            self._age(self._recent.popleft())

    def _age(self, item: T) -> None:
        if not self._num_older:
            return
        if self._num_aged % self._stride == 0:
            self._older.append(self._thin(item) if self._thin else item)
        self._num_aged += 1
        if len(self._older) > self._num_older:
            self._older = self._older[::2]
            self._stride *= 2

    def after(self, number: int) -> list[T]:
        """Return what came after the item of `number`, as far as it is kept whole."""
        count = min(self.head - number, len(self._recent))
        return list(islice(self._recent, len(self._recent) - count, None)) if count > 0 else []

    def all(self, max_items: int = 0) -> list[T]:
        """Return what is kept, oldest first, thinned evenly to `max_items` (0: all); the newest is always in it."""
        items = [*self._older, *self._recent]
        if not max_items or len(items) <= max_items:
            return items
        step = len(items) / max_items
        return [items[len(items) - 1 - int(index * step)] for index in reversed(range(max_items))]

    def last(self) -> T | None:
        """Return the newest item; None where there is none."""
        return self._recent[-1] if self._recent else None

    def drop_last_while(self, condition: Callable[[T], bool]) -> None:
        """Take back the newest items for which `condition` holds; their numbers are not used again."""
        while self._recent and condition(self._recent[-1]):
            self._recent.pop()
