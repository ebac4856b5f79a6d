"""What an optimizer's parameter groups hold in place of the script's parameters: ranges of flat shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distui.core.offload.homes import Homes
from distui.core.offload.memory import MemoryCell
from distui.core.sharding.unit import Unit


@dataclass(slots=True)
class FlatRun:
    """A contiguous range of one unit's shard, stepped as one parameter; or a whole matrix that this rank owns."""

    unit: Unit
    indices: tuple[int, ...]
    """The unit's parameters that lie in it."""
    start: int
    end: int
    param: nn.Parameter
    """Empty between steps where its values rest elsewhere than in the step's memory."""
    shape: tuple[int, ...]
    is_owned: bool = False
    """Whether it is a matrix that only this rank steps (see `matrices`); start and end then count in the matrix."""


def flat_runs(places: list[tuple[Unit, int]], homes: Homes | None) -> list[FlatRun]:
    """Return the contiguous ranges of this rank's shards in which the parameters at `places` lie."""
    by_unit: dict[int, tuple[Unit, list[int]]] = {}
    for unit, index in places:
        by_unit.setdefault(id(unit), (unit, []))[1].append(index)
    runs = []
    for unit, indices in by_unit.values():
        base = unit.layout.shard(unit.rank)[0]
        for start, end in unit.layout.runs(indices, unit.rank):
            inside = tuple(
                index
                for index in indices
                if unit.layout.spans[index].end > base + start and unit.layout.spans[index].offset < base + end
            )
            runs.append(_run(unit, inside, start, end, (end - start,), homes))
    return runs


def whole_run(unit: Unit, index: int, homes: Homes | None) -> FlatRun:
    """Return a parameter that this rank has whole, in its own shape."""
    span = unit.layout.spans[index]
    return _run(unit, (index,), span.offset, span.end, span.shape, homes)


def _run(
    unit: Unit, indices: tuple[int, ...], start: int, end: int, shape: tuple[int, ...], homes: Homes | None
) -> FlatRun:
    device = unit.device if homes is None else homes.step_device
    cell = unit.master_cell
    master = cell.tensor if isinstance(cell, MemoryCell) else None if cell is not None else unit.master
    if master is not None and master.device.type == device.type:
        values = master[start:end].view(shape)
    else:
        values = torch.empty(0, dtype=torch.float32 if unit.has_master else unit.dtype, device=device)
    return FlatRun(unit, indices, start, end, nn.Parameter(values), shape)
