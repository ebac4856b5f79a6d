"""Iterable data sets: every rank reads the whole stream and keeps its own slice of each global micro-batch.

So nothing travels between ranks, and the batches are those of one process, also with workers: each worker of each rank
sees what the same worker of one process would see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distui.core.data.slices import cut


class CollateSlice:
    """Collates a rank's slice of the samples of a global micro-batch; gives (num_real, num_repeats, batch)."""

    def __init__(self, collate: Callable[[Any], Any], size: int, num_ranks: int, rank: int, whole: bool):
        """`size` is a full micro-batch's over all ranks; with `whole` an item of the stream is a batch already."""
        self._collate, self._size, self._num_ranks, self._rank, self._whole = collate, size, num_ranks, rank, whole
        self._first: list[Any] | None = None
        """What a short last micro-batch repeats; a persistent worker keeps that of its first epoch."""

    def __call__(self, group: list[Any]) -> tuple[int, int, Any]:
        """Collate this rank's slice of `group`."""
        if self._first is None:
            self._first = group[: self._num_ranks]
        taken = cut(group, self._first, self._num_ranks, self._rank)
        if len(group) == self._size:
            assert taken.num_repeats == 0
        return taken.num_real, taken.num_repeats, self._collate(taken.items[0] if self._whole else taken.items)
