"""Where the sender has got to in the ledger."""

from __future__ import annotations

import math

from distui.core.telemetry.ledger import CollectiveEntry, LedgerReader


class LedgerCursor:
    """Hands out each finished collective of a ledger once, and counts those that were overrun before."""

    def __init__(self, reader: LedgerReader) -> None:
        self._reader = reader
        self._last = 0
        self._unfinished: list[int] = []

    def drain(self, finished_before_s: float = math.inf, *, rest: bool = False) -> tuple[list[CollectiveEntry], int]:
        """Return what has finished since the last call, and how many were lost; `rest` adds what never finished."""
        reader, found, lost = self._reader, [], 0
        head = reader.head()
        oldest = max(1, head - reader.capacity + 1)
        if self._last + 1 < oldest:
            lost += oldest - self._last - 1
        tokens = [*self._unfinished, *range(max(self._last + 1, oldest), head + 1)]
        self._last, self._unfinished = head, []
        for token in tokens:
            if token >= oldest and not rest and not reader.finished(token):
                self._unfinished.append(token)
                continue
            entry = reader.entry(token)
            if entry is None:
                lost += 1
            elif rest or (entry.finished_s is not None and entry.finished_s <= finished_before_s):
                found.append(entry)
            else:
                self._unfinished.append(token)
        return found, lost
