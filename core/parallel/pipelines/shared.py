"""Gradients of what several stages of a pipeline hold: each has a part, and all need the sum."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distui.core.axes.groups import Axes, make
from distui.core.ranks import ops
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units.unit import Unit

ALL, ENDS = "all stages", "the first and the last stage"


class SharedGradients:
    """The sums over stages, once a pass."""

    def __init__(self, axes: Axes, kinds: set[str]) -> None:
        """`kinds` are who share something: ALL, ENDS. Collective: the world."""
        self._all = axes["pp"]
        self._ends = _ends(axes) if ENDS in kinds else None
        self.sharded: ShardedModel | None = None
        self._is_summed = False

    def _units(self) -> list[Unit]:
        assert self.sharded is not None and self.sharded.cuts is not None
        shared = self.sharded.cuts.shared
        return [unit for unit in self.sharded.units if unit.trainable and id(unit.params[0]) in shared]

    def _group_of(self, unit: Unit) -> dist.ProcessGroup | None:
        return self._ends if unit.name.endswith(ENDS) else self._all

    def reopen(self) -> None:
        """Before another pass in one step: take of a sum over stages one stage's share, for it will be summed again."""
        for unit in self._units() if self._is_summed else ():
            if unit.has_gradient:
                with unit.gradient(writes=True) as grad:
                    grad.mul_(1.0 / dist.get_world_size(self._group_of(unit)))
        self._is_summed = False

    def sum(self) -> None:
        """Sum the gradients of what several stages hold, which are parts of one; all have the same then."""
        for unit in self._units():
            unit.finish_reduce()
            group = self._group_of(unit)
            present = torch.tensor(list(unit.present), dtype=torch.int32)
            with unit.gradient(writes=True) as grad:
                travelling = grad.to(ops.device_over(grad.device, group))
                dist.all_reduce(travelling, group=group)
                if travelling is not grad:
                    grad.copy_(travelling)
            counts = present.to(ops.object_device(group))
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=group)
            unit.present = bytearray(counts.tolist())
        self._is_summed = True


def _ends(axes: Axes) -> dist.ProcessGroup:
    """Return the group of the first and the last stage. Collective: the world."""
    lines = axes.sizes.groups("pp")
    return make([part for line in lines for part in ([line[0], line[-1]], line[1:-1])], "pp ends")
