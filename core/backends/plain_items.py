"""What a rank holds of plain tensors and `DTensor`s, as flat ranges by name, and what it weighs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distui.core.backends.base import Part
from distui.core.checkpoint.flat import FlatShard


def local(tensor: Any) -> Any:
    """Return this rank's piece of a `DTensor`, in the same memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _start(tensor: torch.Tensor) -> int:
    """Return where this rank's piece begins in the flattened whole."""
    if not isinstance(tensor, DTensor) or not tensor.numel():
        return 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]) * (tensor.numel() // tensor.shape[0]) if offset else 0


def _piece(tensor: torch.Tensor, cut: tuple[int, int]) -> FlatShard:
    """Return this rank's piece; of what every rank holds, the range `cut`."""
    if isinstance(tensor, DTensor):
        return FlatShard(local(tensor.detach()).reshape(-1), _start(tensor), tensor.numel())
    low, high = cut
    return FlatShard(tensor.detach().reshape(-1)[low:high], low if high > low else 0, tensor.numel())


def _cuts(tensors: Iterable[torch.Tensor], part: Part | None) -> Iterator[tuple[int, int]]:
    """Yield the range of each tensor that is this rank's part of all of them, laid end to end."""
    sizes = [tensor.numel() for tensor in tensors]
    rank, count = part if part is not None else (0, 1)
    begin, end = sum(sizes) * rank // count, sum(sizes) * (rank + 1) // count
    at = 0
    for size in sizes:
        low = min(max(begin - at, 0), size)
        yield low, min(max(end - at, low), size)
        at += size


def model_items(model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name; rank 0 writes the buffers."""
    params = dict(nn.Module.named_parameters(model))
    items: dict[str, torch.Tensor] = {}
    for (name, param), cut in zip(params.items(), _cuts(params.values(), part), strict=True):
        items[name] = _piece(param, cut)
    for name, buffer in model.named_buffers():
        items[name] = _piece(buffer, (0, 0 if part is not None and part[0] else buffer.numel()))
    return items


Held = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Parameters of a model, each with what its optimizer steps: the same, or this rank's piece of it."""


def optimizer_items(held: Held, states: Any, names: dict[int, str], part: Part | None) -> dict[str, Any]:
    """Return states by `<parameter>.<state>`: flat pieces where they have the parameter's shape, else as they are."""
    held = list(held)
    items: dict[str, Any] = {}
    for (param, stepped), (low, high) in zip(held, _cuts((param for param, _ in held), part), strict=True):
        for key, value in states.get(stepped, {}).items():
            name = f"{names[id(param)]}.{key}"
            if isinstance(value, (int, float)):
                items[name] = value
            if not isinstance(value, torch.Tensor):
                continue
            flat = value.detach().reshape(-1)
            if value.shape != stepped.shape or not value.dim():
                items[name] = value
            elif isinstance(param, DTensor):
                items[name] = FlatShard(flat, _start(param), param.numel())
            else:
                items[name] = FlatShard(flat[low:high], low if high > low else 0, param.numel())
    return items


def states_by_name(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the states that a checkpoint has of each parameter, with what it says of them."""
    found: dict[str, dict[str, Any]] = {}
    for full, meta in saved.items():
        name, _, key = full.rpartition(".")
        found.setdefault(name, {})[key] = meta
    return found


def allocate_states(held: Held, states: Any, names: dict[int, str], saved: Mapping[str, Any]) -> None:
    """Let every parameter have exactly the states that the checkpoint has of it."""
    by_name = states_by_name(saved)
    for param, stepped in held:
        metas = by_name.get(names[id(param)], {})
        forget_others(states, stepped, metas)
        for key, meta in metas.items():
            if meta.number is not None:
                states[stepped][key] = meta.number
            elif key not in states[stepped] and meta.size and meta.size.numel() == param.numel():
                states[stepped][key] = torch.zeros_like(stepped.detach(), dtype=meta.dtype)
            elif key not in states[stepped]:
                device = stepped.device if meta.size else None
                states[stepped][key] = torch.zeros(meta.size, dtype=meta.dtype, device=device)


def forget_others(states: Any, stepped: Any, kept: Iterable[str]) -> None:
    """Drop those states of what an optimizer steps that are not in `kept`; without any it is as before a first step."""
    state = states.get(stepped, {})
    for key in set(state) - set(kept):
        del state[key]
    if not state:
        states.pop(stepped, None)


def count_bytes(**tensors: Iterable[Any]) -> dict[str, int]:
    """Return the bytes that each category's tensors take on this rank; memory that several share counts once."""
    seen: set[int] = set()
    total = dict.fromkeys(tensors, 0)
    for category, values in tensors.items():
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            storage = local(value).untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total[category] += storage.nbytes()
    return total
