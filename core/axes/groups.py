"""Every process group of a job, made once, by all ranks, in one order."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distui.core.axes.sizes import AXES, KINDS, AxisSizes

_lists: weakref.WeakKeyDictionary[dist.ProcessGroup, Sequence[list[int]]] = weakref.WeakKeyDictionary()
"""The ranks of all groups that were made together with one."""


class Axes:
    """This rank among the axes: `axes["tp"]` is its group of a kind (see `sizes.KINDS`), None where it is alone."""

    def __init__(self, sizes: AxisSizes) -> None:
        """Make the groups. Collective: all ranks of the world, with the same sizes."""
        self.sizes = sizes
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.place = sizes.place(self.rank)
        """This rank's coordinate on each axis."""
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        self._meshes: dict[str, DeviceMesh] = {}
        made: dict[tuple[bool, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None] = {}
        for kind in KINDS:
            groups = sizes.groups(kind)
            # Where an axis has one rank, kinds have the same groups. But tokens travel to experts in the midst of a
            # backward, beside sums and gathers that have an order of their own.
            alike = kind == "ep", tuple(map(tuple, groups))
            if alike not in made:
                made[alike] = self._make(kind, groups)
            self._groups[kind] = made[alike]

    def _make(self, kind: str, groups: Sequence[list[int]]) -> dist.ProcessGroup | None:
        if len(groups[0]) == 1:
            return None
        return dist.group.WORLD if len(groups) == 1 and kind != "ep" else make(groups, kind)

    def __getitem__(self, kind: str) -> dist.ProcessGroup | None:
        """Return this rank's group of `kind`; None where that is this rank alone."""
        return self._groups[kind]

    def size(self, kind: str) -> int:
        """Return how many ranks a group of `kind` has."""
        return len(self.peers(kind))

    def index(self, kind: str) -> int:
        """Return this rank's place in its group of `kind`, from 0."""
        return self.peers(kind).index(self.rank)

    def peers(self, kind: str) -> list[int]:
        """Return the ranks of this rank's group of `kind`, in order."""
        return self.sizes.of_kind(self.rank, kind)

    @property
    def shares(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None:
        """The ranks that share states with this one, and its copies; None where one copy is all there is."""
        copies = self["replica"]
        return None if copies is None else (self["shard"], copies)

    @functools.cached_property
    def alone(self) -> dist.ProcessGroup:
        """A group of this rank only, for whoever must name one. Collective the first time: the world."""
        return make([[rank] for rank in range(self.sizes.world)], "alone")

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return the axes as torch's DeviceMesh, of the groups that there are. Collective the first time: the world."""
        if device_type in self._meshes:
            return self._meshes[device_type]
        shape = [getattr(self.sizes, axis) for axis in AXES]
        groups = [self[kind] or self.alone for kind in ("pp", "data", "cp", "tp")]
        ranks = torch.arange(self.sizes.world).view(shape)
        self._meshes[device_type] = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=AXES)
        return self._meshes[device_type]


def make(lists: Sequence[list[int]], name: str, backend: str | None = None) -> dist.ProcessGroup:
    """Make a group of each of `lists` and return this rank's. Collective: the world, which `lists` divide."""
    mine, rank = None, dist.get_rank()
    for ranks in lists:
        group = dist.new_group(ranks, backend=backend, group_desc=name)
        if rank in ranks:
            mine = group
    assert mine is not None
    _lists[mine] = lists
    return mine


def split(group: dist.ProcessGroup, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's neighbours in `group`, `size` at a time, and the ranks at its place among theirs.

    Collective: as `group` was made; of a group of `Axes` all others of its kind are split with it.
    """
    lists = _lists.get(group) or [dist.get_process_group_ranks(group)]
    near = [ranks[first : first + size] for ranks in lists for first in range(0, len(ranks), size)]
    return make(near, "near"), make([ranks[place::size] for ranks in lists for place in range(size)], "across")


def beside(group: dist.ProcessGroup, backend: str | None = None) -> dist.ProcessGroup:
    """Return another group of the same ranks, for traffic with an order of its own. Collective: as `group` was made.

    Of a group of `Axes` all others of its kind are made with it: each rank of the world must see the same groups made.
    """
    if (lists := _lists.get(group)) is not None:
        return make(lists, group.group_desc, backend)
    found = dist.new_group(dist.get_process_group_ranks(group), backend=backend)
    assert found is not None
    return found
