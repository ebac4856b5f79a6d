"""How the world is laid out: world = pp x dp x cp x tp, tp innermost; ep is folded into dp x cp x tp. Torch-free.

dp x cp ranks average their gradients. They share states (ZeRO) all together, or in groups of neighbours, each of which
holds one copy: then ranks at the same place in these are replicas of each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

AXES = ("pp", "dp", "cp", "tp")
"""Outermost first: ranks that differ in the last only are neighbours."""
GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "data": ("dp",),
    "average": ("dp", "cp"),
    "model": ("pp", "cp", "tp"),
    "pieces": ("pp", "tp"),
    "stage": ("dp", "cp", "tp"),
}
"""What each kind of group spans: `data` has different batches, `average` averages gradients, `model` shares a
batch, `pieces` divides the parameters, and `stage` has the same blocks."""
FOLDED = ("shard", "replica", "ep", "expert_shard", "expert_pieces")
"""Kinds that divide an averaging group: `shard` shares states, `replica` are copies of one share. And those of experts:
neighbours among a shard group's ranks and their tensor-parallel ones, `ep`, have different experts, ranks there that
are ep apart, `expert_shard`, the same ones. `expert_pieces` has all experts of all stages, each once."""
KINDS = (
    *("tp", "cp", "pp", "data", "shard", "average", "model", "pieces", "stage", "replica"),
    *("ep", "expert_shard", "expert_pieces"),
)
"""All of them, in the order in which they are made."""


class Strategy(Protocol):
    """What of `config.schema.StrategySection` is read."""

    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    expert_parallel: int
    shard_size: int


@dataclass(frozen=True, slots=True)
class AxisSizes:
    """The sizes of the axes: pp x dp x cp x tp is the number of ranks; replicas divide dp, and ep what they leave."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    replicas: int = 1
    """Copies of the states among the ranks that average their gradients."""

    @classmethod
    def of(cls, strategy: Strategy, world_size: int) -> AxisSizes:
        """Return the sizes that `strategy` gives `world_size` ranks; what the model's axes leave is data-parallel.

        Raises: ValueError where they do not divide the world; `config.check` says so to users.
        """
        pp, cp, tp = strategy.pipeline_parallel, strategy.context_parallel, strategy.tensor_parallel
        if world_size % (pp * cp * tp):
            raise ValueError(f"pp x cp x tp = {pp} x {cp} x {tp} does not divide {world_size} ranks")
        dp, ep = world_size // (pp * cp * tp), strategy.expert_parallel
        size = strategy.shard_size or dp
        if dp % size or size * cp * tp % ep:
            raise ValueError(f"shard_size = {size} does not divide dp = {dp}, or ep = {ep} not {size} x {cp} x {tp}")
        return cls(pp, dp, cp, tp, ep, dp // size)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def has_model_axes(self) -> bool:
        """Whether several ranks share one batch; else every rank is data-parallel."""
        return self.pp * self.cp * self.tp > 1

    @property
    def sharing(self) -> int:
        """Ranks that share one copy of the states."""
        return self.dp * self.cp // self.replicas

    def size(self, axes: Iterable[str]) -> int:
        """Return the product of some axes' sizes."""
        return math.prod(getattr(self, axis) for axis in axes)

    def place(self, rank: int) -> dict[str, int]:
        """Return the coordinate of `rank` on each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank_at(self, place: dict[str, int]) -> int:
        """Return the rank at a coordinate; the inverse of `place`."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + place[axis]
        return rank

    def peers(self, rank: int, axes: Iterable[str]) -> list[int]:
        """Return the ranks that differ from `rank` in nothing but `axes`, in order, itself included."""
        free, place = set(axes), self.place(rank)
        ranges = [range(getattr(self, axis)) if axis in free else (place[axis],) for axis in AXES]
        return [self.rank_at(dict(zip(AXES, found, strict=True))) for found in itertools.product(*ranges)]

    def of_kind(self, rank: int, kind: str) -> list[int]:
        """Return the ranks of the group of `kind` that `rank` is in, in order."""
        if kind not in FOLDED:
            return self.peers(rank, GROUPS[kind])
        if kind == "expert_pieces":
            return sorted(other for mine in self.of_kind(rank, "ep") for other in self.peers(mine, ("pp",)))
        of_experts = kind in ("ep", "expert_shard")
        of_all = self.of_kind(rank, "stage" if of_experts else "average")
        at, size = of_all.index(rank), self.sharing * (self.tp if of_experts else 1)
        if kind == "replica":
            return of_all[at % size :: size]
        sharing, at = of_all[at - at % size :][:size], at % size
        if kind == "shard":
            return sharing
        return sharing[at % self.ep :: self.ep] if kind == "expert_shard" else sharing[at - at % self.ep :][: self.ep]

    def groups(self, kind: str) -> list[list[int]]:
        """Return all groups of `kind`, in one order: every rank is in exactly one of them."""
        found = [self.of_kind(rank, kind) for rank in range(self.world)]
        return [ranks for rank, ranks in enumerate(found) if ranks[0] == rank]
