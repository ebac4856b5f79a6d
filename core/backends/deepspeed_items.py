"""Where DeepSpeed 0.19 keeps gradients, fp32 masters and states of its ZeRO stages, by the parameters' names.

Stages 1 and 2 cut each parameter group's flat buffer over the ranks (`param._hp_mapping` says which range of a
parameter is here), stage 3 each parameter (`param.ds_tensor`), padded to a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.base import Part
from distui.core.backends.plain_items import forget_others, states_by_name
from distui.core.checkpoint.flat import FlatShard

Place = tuple[torch.Tensor, int, int, int]
"""A flat master, where a parameter's range lies in it, how long it is, and where it begins in the parameter."""


def _rank_numel(param: Any) -> tuple[int, int]:
    """Return where this rank's range of a stage-3 parameter begins, and how many elements of it are no padding."""
    each = param.ds_tensor.ds_numel
    start = min(each * dist.get_rank(param.ds_process_group), param.ds_numel)
    return start, min(each, param.ds_numel - start)


def _place(zero: Any, param: Any, stage: int) -> Place | None:
    """Return where the master of `param` is on this rank; None where none of it is."""
    if stage == 3:
        group, offset, _ = zero.grad_position[zero.get_param_id(param)]
        start, numel = _rank_numel(param)
        return zero.fp32_partitioned_groups_flat[group], offset, numel, start
    mapping = param._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return zero.single_partition_of_fp32_groups[mapping.param_group_index], here.start, here.numel, there.start


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _shard(flat: torch.Tensor, place: Place, numel: int) -> FlatShard:
    _, offset, length, start = place
    return FlatShard(flat.detach().view(-1)[offset : offset + length], start, numel)


def model_items(model: nn.Module, zero: Any, stage: int, part: Part | None) -> dict[str, FlatShard]:
    """Return masters, frozen parameters and buffers by name; rank 0 writes what every rank holds."""
    mine = part is None or part[0] == 0
    found = {}
    for name, param in nn.Module.named_parameters(model):
        if param.requires_grad:
            place = _place(zero, param, stage)
            found[name] = _shard(place[0], place, _numel(param)) if place else _nothing(torch.float32, param)
        elif stage == 3:
            start, numel = _rank_numel(param)
            found[name] = FlatShard(param.ds_tensor.detach().view(-1)[:numel], start, _numel(param))  # type: ignore[attr-defined]
        else:
            found[name] = _replicated(param, mine)
    for name, buffer in model.named_buffers():
        found[name] = _replicated(buffer, mine)
    return found


def _nothing(dtype: torch.dtype, param: Any) -> FlatShard:
    return FlatShard(torch.empty(0, dtype=dtype, device=param.device), 0, _numel(param))


def _replicated(tensor: torch.Tensor, mine: bool) -> FlatShard:
    flat = tensor.detach().reshape(-1)
    return FlatShard(flat if mine else flat[:0], 0, flat.numel())


def assemble(item: FlatShard, group: dist.ProcessGroup, sharded: bool) -> torch.Tensor:
    """Return the whole flat tensor of which each rank has an item. Collective where `sharded`."""
    if not sharded:
        return item.local.clone()
    whole = torch.zeros(item.numel(), dtype=item.dtype, device=item.local.device)
    whole[item.start : item.start + item.local.numel()] = item.local
    dist.all_reduce(whole, group=group)
    return whole


def _states(zero: Any, params: Iterable[Any], names: dict[int, str], stage: int) -> Iterator[tuple[str, Any, Place]]:
    for param in params:
        place = _place(zero, param, stage)
        if place is not None:
            yield names[id(param)], param, place


def optimizer_items(zero: Any, params: Iterable[Any], names: dict[int, str], stage: int) -> dict[str, Any]:
    """Return states by `<parameter>.<state>`."""
    found: dict[str, Any] = {}
    for name, param, place in _states(zero, params, names, stage):
        for key, value in zero.optimizer.state.get(place[0], {}).items():
            if isinstance(value, (int, float)):
                found[f"{name}.{key}"] = value
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = _shard(value, place, _numel(param)) if value.dim() else value
    return found


def allocate_states(
    zero: Any, params: Iterable[Any], names: dict[int, str], stage: int, saved: Mapping[str, Any]
) -> None:
    """Let every master have exactly the states that a checkpoint has of the parameters in it."""
    by_name, kept = states_by_name(saved), dict[Any, set[str]]()
    for name, _, place in _states(zero, params, names, stage):
        kept.setdefault(place[0], set()).update(key for key in by_name.get(name, ()))
    for master, keys in kept.items():
        forget_others(zero.optimizer.state, master, keys)
    for name, _, place in _states(zero, params, names, stage):
        for key, meta in by_name.get(name, {}).items():
            state = zero.optimizer.state[place[0]]
            if meta.number is not None:
                state[key] = meta.number
            elif key not in state:
                like = place[0].detach() if meta.size else torch.zeros(())
                state[key] = torch.zeros_like(like, dtype=meta.dtype)


def publish(zero: Any, stage: int) -> None:
    """Bring the masters to the parameters of all ranks. Collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def refresh_masters(zero: Any, stage: int) -> None:
    """Take what somebody wrote into parameters into the masters, and leave the others' precision alone."""
    if stage < 3:
        for master, parts in zip(
            zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
        ):
            _take(master.data, parts[dist.get_rank(zero.dp_process_group)])
    else:
        for master, part in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            _take(master.data, part)


def _take(master: torch.Tensor, weight: torch.Tensor) -> None:
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype)))


def _averaged(zero: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in zero.averaged_gradients.values():
        if value is not None:
            found += [value] if isinstance(value, torch.Tensor) else [part for part in value if part is not None]
    return found


def gradients(engine: Any, params: Iterable[torch.Tensor], stage: int) -> list[torch.Tensor]:
    """Return this rank's part of the averaged gradients, once the last backward of a step is over."""
    if not stage:
        return [param.grad for param in params if param.grad is not None]
    return _averaged(engine.optimizer)


def discard_gradients(engine: Any, params: Iterable[torch.Tensor], stage: int) -> None:
    """Forget gradients, as DeepSpeed does after a step that overflowed."""
    if not stage:
        engine.zero_grad()
        return
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    if stage == 3:
        zero.averaged_gradients = {}
        return
    zero._release_preflattened_grad_buffers()
    zero.micro_step_id = -1
    for key in zero.averaged_gradients:
        zero.averaged_gradients[key] = None
        zero.all_grad_tensors[key] = None


def tensors_by_category(engine: Any, models: list[nn.Module], stage: int) -> dict[str, list[Any]]:
    """Return the tensors of this rank by category."""
    zero = engine.optimizer
    params = [param for model in models for param in model.parameters()]
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    return {
        "parameters": [*params, *(param.ds_tensor for param in params if hasattr(param, "ds_tensor"))],
        "gradients": [*(param.grad for param in params), *_averaged(zero)],
        "optimizer_states": [*masters, *(value for state in zero.optimizer.state.values() for value in state.values())],
        "buffers": [buffer for model in models for buffer in model.buffers()],
    }
