"""What an optimizer's parameter groups hold in place of the script's parameters: ranges of flat shards."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distui.core.ranks import streams
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.homes.memory import MemoryCell
from distui.core.sharding.units.unit import Unit


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

    @property
    def present(self) -> list[int]:
        """Of each of its parameters, 1 where some rank has a gradient of it."""
        return [self.unit.present[index] for index in self.indices]

    @property
    def has_gradient(self) -> bool:
        """Whether it is stepped: all of its parameters have a gradient (`split_run` sees to that)."""
        return self.unit.has_gradient and all(self.present)


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
                for index in sorted(indices)
                if unit.layout.spans[index].end > base + start and unit.layout.spans[index].offset < base + end
            )
            runs.append(_run(unit, inside, start, end, (end - start,), homes))
    return runs


def alike_in_numbers(
    places: list[tuple[Unit, int]], states: Mapping[Any, Any]
) -> dict[tuple[Any, ...], list[tuple[Unit, int]]]:
    """Return `places` by the numbers in the states that the optimizer has of them: a run has one count of steps."""
    alike: dict[tuple[Any, ...], list[tuple[Unit, int]]] = {}
    for unit, index in places:
        alike.setdefault(kind_of_state(states.get(unit.params[index], {})), []).append((unit, index))
    return alike


def kind_of_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what states must have in common to be one run's: their keys, and those that are numbers."""
    numbers = [(key, float(value)) for key, value in state.items() if is_number(value)]
    return (*sorted(state), *sorted(numbers))


def is_number(value: Any) -> bool:
    """Tell whether a state is one number of a whole parameter."""
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and not value.dim())


def whole_run(unit: Unit, index: int, homes: Homes | None) -> FlatRun:
    """Return a parameter that this rank has whole, in its own shape."""
    span = unit.layout.spans[index]
    run = _run(unit, (index,), span.offset, span.end, span.shape, homes)
    vars(run.param).update(vars(unit.params[index]))
    return run


def _run(
    unit: Unit, indices: tuple[int, ...], start: int, end: int, shape: tuple[int, ...], homes: Homes | None
) -> FlatRun:
    device = unit.device if homes is None else homes.step_device
    cell = unit.master_cell
    master = cell.at_hand() if isinstance(cell, MemoryCell) else None if cell is not None else unit.master
    if master is not None and streams.machine.holds(master) == streams.machine.is_apart(device):
        values = master[start:end].view(shape)
    else:
        values = torch.empty(0, dtype=torch.float32 if unit.has_master else unit.dtype, device=device)
    return FlatRun(unit, indices, start, end, nn.Parameter(values), shape)


def split_run(run: FlatRun, alike: Sequence[Hashable]) -> list[FlatRun]:
    """Return a flat run cut into stretches of parameters that are `alike`, of which each has a value."""
    if run.is_owned or len(set(alike)) == 1:
        return [run]
    base = run.unit.layout.shard(run.unit.rank)[0]
    pieces: list[FlatRun] = []
    first = 0
    for at in range(1, len(run.indices) + 1):
        if at < len(run.indices) and alike[at] == alike[first]:
            continue
        indices = run.indices[first:at]
        low = max(run.unit.layout.spans[indices[0]].offset - base, run.start)
        high = min(run.unit.layout.spans[indices[-1]].end - base, run.end)
        param = run.param.detach()
        # Elsewhere than in memory it is empty between steps.
        values = param[low - run.start : high - run.start] if param.numel() else param
        pieces.append(FlatRun(run.unit, indices, low, high, nn.Parameter(values), (high - low,)))
        first = at
    return pieces


def piece_of_state(run: FlatRun, piece: FlatRun, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a flat run's optimizer state that belongs to `piece` of it; numbers are copied."""
    found = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            flat = value.shape == torch.Size(run.shape) and value.dim() > 0
            value = value[piece.start - run.start : piece.end - run.start] if flat else value.clone()
        found[key] = value
    return found


def carry_states(
    optimizer: torch.optim.Optimizer,
    place: Mapping[int, tuple[Unit, int]],
    states: Mapping[Any, Any],
    params: list[Any],
    runs: list[FlatRun],
) -> None:
    """Take over states that `optimizer` had of its `params` already (a resumed script) into the states of `runs`."""
    if not states:
        return
    for run in runs:
        owner_states: dict[int, Any] = {}
        for param in params:
            unit, index = place.get(id(param), (None, 0))
            if unit is run.unit:
                owner_states[index] = states.get(param)
        present = [owner_states[index] for index in run.indices if owner_states.get(index)]
        if not present:
            continue
        flat_state: dict[str, Any] = {}
        base = run.unit.layout.shard(run.unit.rank)[0]
        is_whole = run.is_owned or len(run.shape) != 1
        for key, value in (present[0] or {}).items():
            if not (isinstance(value, torch.Tensor) and value.dim()) or is_whole:
                flat_state[key] = value
                continue
            flat = torch.zeros(run.end - run.start, dtype=value.dtype, device=value.device)
            for index in run.indices:
                span = run.unit.layout.spans[index]
                low = max(span.offset, base + run.start)
                high = min(span.end, base + run.end)
                source = owner_states[index]
                if source and low < high:
                    part = source[key].reshape(-1)[low - span.offset : high - span.offset]
                    flat[low - base - run.start : high - base - run.start].copy_(part)
            flat_state[key] = flat.view(run.shape)
        optimizer.state[run.param] = flat_state
