"""The index arithmetic of data parallelism: pure, for indices and for streams of samples alike.

Global micro-batch k is `order[k*m*N : (k+1)*m*N]` for micro-batches of m samples on N ranks; rank r gets the r-th m of
them. So N ranks see the batches that one process with batches of m*N sees. The last, shorter micro-batch is cut into N
equal parts; where N does not divide it, the first samples of the order are repeated at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slice(Generic[T]):
    """What one rank takes of a global micro-batch."""

    items: list[T]
    num_real: int
    """Samples of the whole micro-batch without repeats."""
    num_repeated: int
    """Repeats at the end of the whole micro-batch."""
    is_last: bool
    """Whether the order ends with it."""


def _one(item: object) -> int:
    return 1


def rank_slices(
    order: Iterable[T],
    micro_size: int,
    num_ranks: int,
    rank: int,
    drop_last: bool = False,
    weight: Callable[[T], int] = _one,
) -> Iterator[Slice[T]]:
    """Yield rank `rank`'s slice of each global micro-batch of `order`, which is read one item ahead.

    `weight` counts the samples of an item, where items are batches. With `drop_last` a micro-batch that is not full is
    left out.
    """
    size = micro_size * num_ranks
    iterator = iter(order)
    first: list[T] = []
    """The items that a short last micro-batch may repeat: fewer than the ranks."""
    group: list[T] = []
    for item in iterator:
        if len(group) == size:
            yield _cut(group, group, num_ranks, rank, weight, is_last=False)
            group = []
        if len(first) < num_ranks:
            first.append(item)
        # A full group is only yielded once the next item shows that it was not the last; with drop_last, once a whole
        # group follows.
        group.append(item)
        if drop_last and len(group) == size:
            break
    else:
        if group and not (drop_last and len(group) < size):
            yield _cut(group, first, num_ranks, rank, weight, is_last=True)
        return
    yield from _full_groups(iterator, group, size, num_ranks, rank, weight)


def _full_groups(
    iterator: Iterator[T], group: list[T], size: int, num_ranks: int, rank: int, weight: Callable[[T], int]
) -> Iterator[Slice[T]]:
    following: list[T] = []
    for item in iterator:
        following.append(item)
        if len(following) == size:
            yield _cut(group, group, num_ranks, rank, weight, is_last=False)
            group, following = following, []
    yield _cut(group, group, num_ranks, rank, weight, is_last=True)


def _cut(
    group: list[T], first: list[T], num_ranks: int, rank: int, weight: Callable[[T], int], is_last: bool
) -> Slice[T]:
    each = -(-len(group) // num_ranks)
    num_repeats = each * num_ranks - len(group)
    repeats = [first[index % len(first)] for index in range(num_repeats)]
    items = (group + repeats)[rank * each : (rank + 1) * each]
    return Slice(items, sum(map(weight, group)), sum(map(weight, repeats)), is_last)


def num_slices(num_samples: int, micro_size: int, num_ranks: int, drop_last: bool = False) -> int:
    """Return how many slices `rank_slices` yields for an order of `num_samples`."""
    size = micro_size * num_ranks
    return num_samples // size if drop_last else -(-num_samples // size)
