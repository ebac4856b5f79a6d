"""The index arithmetic of data parallelism: pure, for indices, batches and samples alike.

Global micro-batch k is `order[k*m*N : (k+1)*m*N]` for micro-batches of m samples on N ranks; rank r gets the r-th m of
them. So N ranks see the batches that one process with batches of m*N sees. The last, shorter micro-batch is cut into N
equal parts; where N does not divide it, the first samples of the order are repeated at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slice(Generic[T]):
    """What one rank takes of a global micro-batch."""

    items: list[T]
    num_real: int
    """Samples of the whole micro-batch, over all ranks, without repeats."""
    num_repeats: int
    """Samples that are repeated at the end of the whole micro-batch."""


def _one(item: object) -> int:
    return 1


def cut(
    group: Sequence[T], first: Sequence[T], num_ranks: int, rank: int, weight: Callable[[T], int] = _one
) -> Slice[T]:
    """Return rank `rank`'s part of a global micro-batch, evened out with the items of `first`.

    `weight` counts the samples of an item, where items are batches.
    """
    each = -(-len(group) // num_ranks)
    repeats = [first[index % len(first)] for index in range(each * num_ranks - len(group))]
    items = [*group, *repeats][rank * each : (rank + 1) * each]
    return Slice(items, sum(map(weight, group)), sum(map(weight, repeats)))


def rank_slices(
    order: Iterable[T],
    micro_size: int,
    num_ranks: int,
    rank: int,
    drop_last: bool = False,
    weight: Callable[[T], int] = _one,
) -> Iterator[Slice[T]]:
    """Yield rank `rank`'s slice of each global micro-batch; with `drop_last` only of those that are full."""
    size = micro_size * num_ranks
    iterator = iter(order)
    first: list[T] | None = None
    while group := list(islice(iterator, size)):
        if drop_last and len(group) < size:
            return
        if first is None:
            first = group[:num_ranks]
        yield cut(group, first, num_ranks, rank, weight)


def num_slices(num_items: int, micro_size: int, num_ranks: int, drop_last: bool = False) -> int:
    """Return how many slices `rank_slices` yields for an order of `num_items`."""
    size = micro_size * num_ranks
    return num_items // size if drop_last else -(-num_items // size)


def mark_last(values: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each value with whether it is the last; reads one value ahead."""
    iterator = iter(values)
    try:
        value = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield value, False
        value = following
    yield value, True
