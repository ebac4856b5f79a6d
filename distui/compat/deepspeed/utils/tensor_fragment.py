"""`safe_get_*` and `safe_set_*`: fp32 masters, optimizer states and gradients by the parameter, at every stage.

All are Collective: every rank calls them, for the same parameter.
"""

from __future__ import annotations

import torch

from distui.compat.deepspeed.engine import DeepSpeedEngine
from distui.compat.deepspeed.zero import _engine_of
from distui.compat.not_offered import NotOffered
from distui.compat.whole import Whole, local_part, put_local
from distui.core.backends.native import NativeBackend
from distui.core.checkpoint.flat import FlatShard


def _place(param: torch.Tensor) -> tuple[DeepSpeedEngine, Whole, str] | None:
    engine = _engine_of([param])
    if engine is None:
        return None
    whole = Whole(engine.engine, engine.module)
    name = whole.name_of(param)
    return (engine, whole, name) if name is not None else None


def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """Return the whole fp32 master of `param`; None where it belongs to no engine."""
    place = _place(param)
    return place[1].read(place[2]) if place is not None else None


def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Give `param` and its master a whole value."""
    place = _place(param)
    if place is not None:
        place[1].write({place[2]: value})


def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """Return a whole optimizer state such as `exp_avg`; None before the first step."""
    place = _place(param)
    if place is None or place[0].optimizer is None:
        return None
    return place[1].read_state(place[0].optimizer, place[2], optim_state_key)


def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Give an optimizer state of `param` a whole value."""
    place = _place(param)
    if place is not None and place[0].optimizer is not None:
        place[1].write_states(place[0].optimizer, {f"{place[2]}.{optim_state_key}": value})


# ---- gradients: between backward and step ----------------------------------------------------------------------------


def _gradient(engine: DeepSpeedEngine, param: torch.Tensor) -> FlatShard | None:
    """Return this rank's part of a reduced gradient."""
    backend = engine.engine.backend
    if not isinstance(backend, NativeBackend):
        if param.grad is None:
            return None
        if hasattr(param.grad, "to_local"):
            raise NotOffered(
                f"safe_get_full_grad under strategy.backend={backend.name} is not offered by distui",
                "gradients are cut by that backend",
                "set strategy.backend to native",
            )
        return FlatShard(param.grad.reshape(-1), 0, param.numel())
    sharded = backend.sharded(engine.module)
    sharded.schedule.finish_gradients()
    for unit in sharded.units:
        for index, own in enumerate(unit.params):
            if own is param and unit.trainable and unit.grad_shard is not None:
                base = unit.layout.shard(unit.rank)[0]
                low, high = unit.layout.owned(index, unit.rank)
                at = unit.layout.spans[index].offset + low - base
                local = unit.grad_shard[at : at + high - low] if low < high else unit.grad_shard[:0]
                return FlatShard(local, low, param.numel())
    return None


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """Return the whole gradient, averaged over ranks, in fp32; it holds the loss scale under fp16."""
    place = _place(param)
    if place is None:
        return None
    engine, whole, name = place
    found = whole._gathered(_gradient(engine, param))
    return found.view(whole._shape(name)) if found is not None else None


def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Give the gradient a whole value."""
    place = _place(param)
    item = _gradient(place[0], param) if place is not None else None
    if item is not None and item.local.numel():
        item.local.copy_(value.reshape(-1)[item.start : item.start + item.local.numel()])


# ---- this rank's part ------------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's flat range of the fp32 master; unlike DeepSpeed's it is not padded."""
    place = _place(param)
    return local_part(place[1]._items()[place[2]]) if place is not None else None


def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """Return this rank's flat range of an optimizer state."""
    place = _place(param)
    if place is None or place[0].optimizer is None:
        return None
    items = place[0].engine.backend.optimizer_items(place[0].optimizer, None)
    return local_part(items.get(f"{place[2]}.{optim_state_key}"))


def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's flat range of the gradient."""
    place = _place(param)
    return local_part(_gradient(place[0], param)) if place is not None else None


def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Give this rank's range of the master a value; all ranks call it."""
    place = _place(param)
    if place is not None:
        put_local(place[1]._items()[place[2]], value.reshape(-1))
        place[0].engine.backend.loaded(place[0].module)


def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Give this rank's range of an optimizer state a value."""
    place = _place(param)
    if place is not None and place[0].optimizer is not None:
        item = place[0].engine.backend.optimizer_items(place[0].optimizer, None).get(f"{place[2]}.{optim_state_key}")
        if item is not None:
            put_local(item, value.reshape(-1))


def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Give this rank's range of the gradient a value."""
    local = safe_get_local_grad(param)
    if local is not None:
        local.copy_(value.reshape(-1))
