"""Where each parameter lies in its unit's flat buffer, and which part of it each rank owns: offsets only, no tensors.

A unit's buffer holds its parameters one after the other, each start aligned, the whole padded so that every rank owns
an equal shard. Padding is zero in every buffer and stays zero, because its gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Elements: 128 bytes in 16-bit formats, so that matrix kernels and O_DIRECT pages find aligned starts."""


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ParamSpan:
    """One parameter's place in the flat buffer, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """First element after the parameter."""
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The flat buffer of one unit, cut into `num_shards` equal shards; all figures in elements."""

    spans: tuple[ParamSpan, ...]
    padded_numel: int
    num_shards: int

    @property
    def numel(self) -> int:
        """Elements that belong to parameters, padding not counted."""
        return sum(span.numel for span in self.spans)

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges of padding: layouts with the same gaps may take turns on a buffer."""
        ends = [0, *(span.end for span in self.spans)]
        starts = [*(span.offset for span in self.spans), self.padded_numel]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

    @property
    def shard_numel(self) -> int:
        """Elements of one rank's shard."""
        return self.padded_numel // self.num_shards

    def shard(self, rank: int) -> tuple[int, int]:
        """Return start and end of the shard of `rank`."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def owned(self, index: int, rank: int) -> tuple[int, int]:
        """Return the part of parameter `index` that `rank` owns: start and end within the parameter."""
        span = self.spans[index]
        start, end = self.shard(rank)
        low = min(max(start - span.offset, 0), span.numel)
        return low, min(max(end - span.offset, low), span.numel)

    def runs(self, indices: Iterable[int], rank: int) -> list[tuple[int, int]]:
        """Return the contiguous ranges of the shard of `rank` that hold the parameters `indices`.

        Ranges count from the shard's start. Neighbours with nothing but padding between them become one range.
        """
        shard_start, _ = self.shard(rank)
        wanted = sorted(indices)
        runs: list[tuple[int, int]] = []
        previous = -2
        for index in wanted:
            low, high = self.owned(index, rank)
            if low == high:
                continue
            start = self.spans[index].offset + low - shard_start
            end = self.spans[index].offset + high - shard_start
            if runs and index == previous + 1:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
            previous = index
        return runs


def plan_layout(
    named_shapes: Sequence[tuple[str, Sequence[int]]], num_shards: int, shard_multiple: int = ALIGNMENT
) -> FlatLayout:
    """Lay parameters out in the given order for `num_shards` ranks; a shard is a multiple of `shard_multiple`."""
    spans = []
    offset = 0
    for name, shape in named_shapes:
        span = ParamSpan(name, tuple(shape), offset)
        spans.append(span)
        offset = round_up(span.end, ALIGNMENT)
    multiple = shard_multiple * num_shards
    return FlatLayout(tuple(spans), max(round_up(offset, multiple), multiple), num_shards)
