"""What a rank holds of native models and optimizers, as flat ranges by the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distui.core.backends.base import Part
from distui.core.backends.plain_items import forget_others, states_by_name
from distui.core.checkpoint.flat import CellShard, FlatShard
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.homes.home import CellSlice
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.optim.runs import FlatRun
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units.guarded import DATA
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.unit import Unit


def _held(unit: Unit, index: int, base: int, end: int, part: Part | None) -> tuple[int, int]:
    """Return the range of parameter `index` that lies in [base, end) of the unit's flat buffer and is this rank's."""
    span = unit.layout.spans[index]
    if part is not None and unit.layout.num_shards == 1:
        rank, count = part
        base = max(base, unit.layout.padded_numel * rank // count)
        end = min(end, unit.layout.padded_numel * (rank + 1) // count)
    elif part is not None:  # each of the copies of a shard gives a part of it
        copy, copies, numel = unit.placement.replica, unit.placement.num_replicas, end - base
        base, end = base + numel * copy // copies, base + numel * (copy + 1) // copies
    low = min(max(base - span.offset, 0), span.numel)
    return low, min(max(end - span.offset, low), span.numel)


def _replicated(tensor: torch.Tensor, part: Part | None, cuts: Cuts | None) -> FlatShard:
    """Return a tensor that every rank holds; rank 0 writes it, so that what belongs together is of one rank."""
    flat = DATA.__get__(tensor).reshape(-1)
    cut = None if cuts is None else cuts.get(tensor)
    writes = part is None or (part[0] == 0 and (cuts is None or cuts.counts(tensor)))
    return FlatShard(flat if writes else flat[:0], 0, tensor.numel() if cut is None else cut.numel, cut)


def _range(
    source: torch.Tensor | CellSlice, at: int, low: int, high: int, place: tuple[Unit, int], part: Part | None
) -> FlatShard:
    """Return the elements [low, high) of a parameter, which lie in `source` from `at` on, if this rank gives them."""
    unit, index = place
    if part is not None and unit.counted is not None and index not in unit.counted:
        high = low
    at = at if high > low else 0
    cut = unit.cut_of(index)
    numel = unit.layout.spans[index].numel if cut is None else cut.numel
    if isinstance(source, CellSlice):
        return CellShard(source.part(at, at + high - low), low, numel, cut)
    return FlatShard(source[at : at + high - low], low, numel, cut)


def _own_part(placement: Placement, part: Part | None, cuts: Cuts | None) -> Part | None:
    """Return which part of what every rank of the shard group holds this one gives: they are not the whole world."""
    return part if part is None or cuts is None else placement.part


def model_items(sharded: ShardedModel, part: Part | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by key: flat shards of what is in units, plain tensors of the rest."""
    sharded.schedule.take_writes()
    cuts, given = sharded.cuts, part
    items: dict[str, torch.Tensor] = {}
    in_units: set[int] = set()
    for unit in sharded.units:
        cell = unit.master_cell
        source: torch.Tensor | CellSlice = unit.master if cell is None else CellSlice(cell, 0, cell.numel)
        base, end = unit.layout.shard(unit.rank)
        part = _own_part(unit.placement, given, cuts)
        for index, (name, param) in enumerate(zip(unit.param_names, unit.params, strict=True)):
            in_units.add(id(param))
            low, high = _held(unit, index, base, end, part)
            at = unit.layout.spans[index].offset + low - base
            items[name] = _range(source, at, low, high, (unit, index), part)
    for name, param in nn.Module.named_parameters(sharded.model):
        if id(param) not in in_units:
            items[name] = _replicated(param, _own_part(sharded.placement_of(param), given, cuts), cuts)
    for name, buffer in sharded.model.named_buffers():
        items[name] = _replicated(buffer, _own_part(sharded.placement, given, cuts), cuts)
    return items


def optimizer_items(optimizer: ShardedOptimizer, part: Part | None) -> dict[str, Any]:
    """Return optimizer states by key: `<parameter>.<state>`, flat shards, whole tensors or numbers."""
    items: dict[str, Any] = {}
    given = part
    for runs in optimizer.runs:
        for run in runs:
            part = _own_part(run.unit.placement, given, optimizer.cuts)
            state = optimizer.state_of(run)
            for key, value in state.items():
                if isinstance(value, (int, float)):
                    items |= {f"{name}.{key}": value for name, _ in _params_of(run)}
                if not isinstance(value, torch.Tensor | CellSlice):
                    continue
                for name, index in _params_of(run):
                    items[f"{name}.{key}"] = _state_item(run, index, value, part)
    return items


def _params_of(run: FlatRun) -> list[tuple[str, int]]:
    return [(run.unit.param_names[index], index) for index in run.indices]


def _state_item(run: FlatRun, index: int, value: torch.Tensor | CellSlice, part: Part | None) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.shape != run.shape:
            return value  # a number, or what an optimizer keeps of rows and columns: whole, with its own shape
        value = value.reshape(-1)
    span = run.unit.layout.spans[index]
    if run.is_owned:
        is_copy = part is not None and run.unit.placement.replica > 0
        return _range(value, 0, 0, 0 if is_copy else span.numel, (run.unit, index), part)
    base = run.unit.layout.shard(run.unit.rank)[0] + run.start
    low, high = _held(run.unit, index, base, base + run.end - run.start, part)
    at = span.offset + low - base
    return _range(value, at, low, high, (run.unit, index), part)


def allocate_states(optimizer: ShardedOptimizer, saved: Mapping[str, Any]) -> None:
    """Let every run have exactly the states that the checkpoint has of its parameters, and be of one count of steps."""
    if optimizer.flat is not None:
        optimizer.flat.forget()
    by_name = states_by_name(saved)

    def counts(name: str) -> tuple[tuple[str, Any], ...]:
        metas = by_name.get(name, {})
        return tuple(sorted((key, meta.number if meta.value is None else meta.value) for key, meta in metas.items()))

    optimizer.split_runs(lambda run: [counts(name) for name, _ in _params_of(run)])
    for runs in optimizer.runs:
        for run in runs:
            metas = [
                (index, key, meta) for name, index in _params_of(run) for key, meta in by_name.get(name, {}).items()
            ]
            kept = {key for _, key, _ in metas}
            forget_others(optimizer.inner.state, run.param, kept)
            if optimizer.stream is not None:
                optimizer.stream._work_of[id(run.unit)].moved.get(id(run), set()).intersection_update(kept)
            for index, key, meta in metas:
                if meta.number is not None:
                    optimizer.inner.state[run.param][key] = meta.number
                    continue
                cut = run.unit.cut_of(index)
                flattened = torch.Size([run.unit.layout.spans[index].numel if cut is None else cut.numel])
                shape = torch.Size(run.shape) if meta.size == flattened else meta.size
                optimizer.make_state(run, key, shape, meta.dtype)


def loaded(sharded: ShardedModel) -> None:
    """Bring what was written into the shards and masters to all ranks. Collective."""
    for optimizer in sharded.optimizers:
        if optimizer.flat is not None:
            optimizer.flat.narrow()
    for unit in sharded.units:
        if unit.trainable:
            unit.publish()
    if sharded.schedule.residence is not None:
        sharded.schedule.residence.invalidate()
    sharded.schedule.finish_gathers()
