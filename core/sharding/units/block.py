"""A block at stage 3: which of its units' parameters are views of whole memory while it runs.

Small blocks share units. A block shows its own parameters alone: blocks of a unit that run one after the other would
else each show, and hide again, those of all. But where anything is compiled it shows all: a compiled block may read a
neighbour's, and what is compiled holds tensors to the strides that they had, which hidden ones have not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from distui.core.sharding.units.unit import Unit


class Block:
    """A module whose units, the group numbered `group`, are whole while it runs. It may run within itself."""

    __slots__ = ("_depth", "_parts", "_shown", "_whole", "group")

    def __init__(self, module: nn.Module, group: int, units: Sequence[Unit]) -> None:
        self.group = group
        own = {id(param) for param in module.parameters()}
        held = ((unit, [i for i, param in enumerate(unit.params) if id(param) in own]) for unit in units)
        self._parts = [(unit, indices) for unit, indices in held if indices]
        self._whole = [(unit, range(len(unit.params))) for unit in units]
        self._shown: Sequence[tuple[Unit, Sequence[int]]] = ()
        self._depth = 0

    def show(self) -> None:
        """Have the block's parameters read as fast as ever until `hide`."""
        self._depth += 1
        if self._depth == 1:
            self._shown = self._whole if _has_compiled() else self._parts
            for unit, indices in self._shown:
                unit.show_some(indices)

    def hide(self) -> None:
        """Undo one `show`; with the last, NaN is in their place again."""
        self._depth -= 1
        if self._depth == 0:
            for unit, indices in self._shown:
                unit.hide_some(indices)


def _has_compiled() -> bool:
    """Tell whether torch has begun to compile anything in this process."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and frames.FRAME_COUNTER > 0
