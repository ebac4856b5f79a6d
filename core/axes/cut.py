"""Which pieces of a tensor a rank holds, and where a flat range of them lies in the whole. Torch-free.

A rank's local tensor is, along each dimension, a row of pieces of the whole: one piece for a plain cut, three for a
fused query-key-value matrix, of any lengths. Ranks may also hold copies of the same pieces (a norm's weight, a head of
keys that several ranks share); one of them owns it, which is who counts it in a norm and writes it to a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Piece = tuple[int, int]
"""Where a piece begins in the whole, and its length."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of the whole tensor, and where its elements lie in the local one, or in a range of it."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    at: int
    """Of the box's first element, counted from the beginning of the range."""
    strides: tuple[int, ...]
    """Between neighbours in the local tensor, one a dimension."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a tensor of `shape`."""

    shape: tuple[int, ...]
    """Of the whole."""
    pieces: tuple[tuple[Piece, ...], ...]
    """For each dimension, the pieces that the rank holds, in the order of its local tensor."""
    copy: int = 0
    """Which of the copies this is; copy 0 is the owner's."""
    num_copies: int = 1

    # ---- ways to cut ---------------------------------------------------------------------------------------------

    @classmethod
    def whole(cls, shape: Sequence[int], copy: int = 0, num_copies: int = 1) -> Cut:
        """Return the cut of a rank that holds everything, as `num_copies` ranks do."""
        return cls(tuple(shape), tuple(((0, length),) for length in shape), copy, num_copies)

    @classmethod
    def split(cls, shape: Sequence[int], dim: int, parts: int, index: int, packed: Sequence[int] = ()) -> Cut:
        """Return part `index` of `parts` along `dim`; the first parts have one more where they cannot be equal.

        `packed` are the lengths of what lies one behind another along `dim`, each of which is cut.
        """
        cut = cls.whole(shape)
        pieces, begin = [], 0
        for length in packed or (shape[dim],):
            low, high = part_of(length, parts, index)
            pieces.append((begin + low, high - low))
            begin += length
        if begin != shape[dim]:
            raise ValueError(f"packed lengths {list(packed)} are {begin} in all, dimension {dim} has {shape[dim]}")
        return cut.with_pieces(dim, tuple(pieces))

    @classmethod
    def heads(cls, shape: Sequence[int], dim: int, num_heads: int, parts: int, index: int) -> Cut:
        """Return the heads of part `index`: several a part, or with fewer heads than parts one, which others copy.

        Raises: ValueError where heads and parts do not divide each other, or the heads not the dimension.
        """
        if shape[dim] % num_heads or (num_heads % parts and parts % num_heads):
            raise ValueError(f"{num_heads} heads of {shape[dim]} elements on {parts} ranks")
        if num_heads >= parts:
            return cls.split(shape, dim, parts, index)
        copies = parts // num_heads
        held = cls.split(shape, dim, num_heads, index // copies)
        return cls(held.shape, held.pieces, index % copies, copies)

    def with_pieces(self, dim: int, pieces: tuple[Piece, ...]) -> Cut:
        """Return this cut with other pieces along `dim`: another axis may cut another dimension."""
        dim %= len(self.shape)
        return Cut(self.shape, (*self.pieces[:dim], tuple(pieces), *self.pieces[dim + 1 :]), self.copy, self.num_copies)

    # ---- what is asked -------------------------------------------------------------------------------------------

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what the rank holds."""
        return tuple(sum(length for _, length in pieces) for pieces in self.pieces)

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    @property
    def local_numel(self) -> int:
        """Elements that the rank holds."""
        return math.prod(self.local_shape)

    @property
    def is_whole(self) -> bool:
        """Whether the rank holds all of it, in its own order."""
        return all(joined(pieces) == ((0, length),) for pieces, length in zip(self.pieces, self.shape, strict=True))

    @property
    def is_owner(self) -> bool:
        """Whether this rank, of those that hold the same pieces, counts and writes them."""
        return self.copy == 0

    def boxes(self, start: int = 0, end: int | None = None) -> Iterator[Box]:
        """Give the boxes of the whole that the elements [start, end) of the flattened local tensor are.

        Each local element is in exactly one box. A box's `at` counts from `start`.
        """
        end = self.local_numel if end is None else end
        if start >= end:
            return
        strides = row_strides(self.local_shape)
        pieces = [_placed(joined(pieces)) for pieces in self.pieces]
        for low, high in flat_boxes(self.local_shape, start, end):
            along = [_overlaps(of_dim, a, b) for of_dim, a, b in zip(pieces, low, high, strict=True)]
            for found in itertools.product(*along):
                at = sum(local * stride for (_, local, _), stride in zip(found, strides, strict=True))
                yield Box(
                    tuple(begin for begin, _, _ in found), tuple(length for _, _, length in found), at - start, strides
                )


def part_of(length: int, parts: int, index: int) -> tuple[int, int]:
    """Return where part `index` of `length` begins and ends; the first parts have one more."""
    each, more = divmod(length, parts)
    begin = index * each + min(index, more)
    return begin, begin + each + (index < more)


def joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces with neighbours that are neighbours in the whole made one, and without empty ones."""
    found: list[Piece] = []
    for begin, length in pieces:
        if found and sum(found[-1]) == begin:
            found[-1] = (found[-1][0], found[-1][1] + length)
        elif length:
            found.append((begin, length))
    return tuple(found)


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, at = [], 1
    for length in reversed(shape):
        strides.append(at)
        at *= length
    return tuple(reversed(strides))


def flat_boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give the boxes (low, high) that the elements [start, end) of a flattened tensor are, at most 2 a dimension."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (first, offset), (last, rest) = divmod(start, inner), divmod(end, inner)
    if first == last:
        for low, high in flat_boxes(shape[1:], offset, rest):
            yield (first, *low), (first + 1, *high)
        return
    if offset:
        for low, high in flat_boxes(shape[1:], offset, inner):
            yield (first, *low), (first + 1, *high)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last, *shape[1:])
    if rest:
        for low, high in flat_boxes(shape[1:], 0, rest):
            yield (last, *low), (last + 1, *high)


def _placed(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """Return for each piece where it begins in the whole and in the local tensor, and its length."""
    starts = itertools.accumulate((length for _, length in pieces), initial=0)
    return [(begin, at, length) for (begin, length), at in zip(pieces, starts, strict=False)]


def _overlaps(pieces: Sequence[tuple[int, int, int]], low: int, high: int) -> list[tuple[int, int, int]]:
    """Return the parts of `pieces` that lie in the local range [low, high), in the same form."""
    found = []
    for begin, at, length in pieces:
        first, last = max(low, at), min(high, at + length)
        if first < last:
            found.append((begin + first - at, first, last - first))
    return found
