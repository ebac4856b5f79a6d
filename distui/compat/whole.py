"""Whole parameters, optimizer states and gradients by the parameter: read and written at every stage and home.

What a rank holds comes from the backend as flat ranges by name (`FlatShard`), so nothing here knows a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.compat.not_offered import NotOffered
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.layout import Entry
from distui.core.engine.engine import Engine
from distui.core.sharding.optim.prepared import PreparedOptimizer


class Whole:
    """The whole tensors of one prepared model. Methods are Collective: all ranks, in the same order."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        """Raises: NotOffered where axes cut the model: a parameter's place is no range of the whole then."""
        if engine.config.strategy.tensor_parallel * engine.config.strategy.pipeline_parallel > 1:
            raise NotOffered(
                "whole tensors by the parameter are not offered by distui where axes cut the model",
                f"the strategy is {engine.config.summary()}",
                "take weights from engine.get_state_dict(model) of distui's engine, all at once",
            )
        self._engine, self._model = engine, model

    def _items(self) -> dict[str, torch.Tensor]:
        return self._engine.backend.model_items(self._model, None)

    def missing(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the names of the model that `weights` has not."""
        return sorted(set(self._items()) - set(weights))

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter; None where the model does not have it."""
        return next((name for name, own in nn.Module.named_parameters(self._model) if own is param), None)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole parameter in fp32, of its master where it has one."""
        found = self._gathered(self._items()[name])
        assert found is not None
        return found.view(self._shape(name))

    def write(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take whole tensors by name; what the model does not have is left."""
        for name, item in self._items().items():
            if name in weights:
                _put(item, weights[name])
        self._engine.backend.loaded(self._model)

    def read_state(self, optimizer: PreparedOptimizer, name: str, key: str) -> torch.Tensor | None:
        """Return a whole optimizer state such as `exp_avg` in fp32; None before the first step."""
        item = self._engine.backend.optimizer_items(optimizer, None).get(f"{name}.{key}")
        if isinstance(item, (int, float)):
            return torch.tensor(float(item))
        found = self._gathered(item)
        return found.view(self._shape(name)) if found is not None else None

    def write_states(self, optimizer: PreparedOptimizer, states: Mapping[str, torch.Tensor]) -> None:
        """Take whole states by `<parameter>.<state>`, making room for those that the optimizer has not yet."""
        held = self._engine.backend.optimizer_items(optimizer, None)
        metas = {key: _entry(item) for key, item in held.items()}
        for key, value in states.items():
            number = held.get(key)
            if isinstance(number, (int, float)):
                metas[key] = Entry(torch.Size(()), torch.float64, number=type(number)(value.item()))
            else:  # flattened, as checkpoints describe them
                metas[key] = _entry(value.reshape(-1) if value.dim() else value)
        self._engine.backend.allocate_states(optimizer, metas)
        for key, item in self._engine.backend.optimizer_items(optimizer, None).items():
            if key in states and isinstance(item, torch.Tensor):
                _put(item, states[key])
        self._engine.backend.loaded(self._model)

    def _shape(self, name: str) -> list[int]:
        return self._engine.backend.param_shapes(self._model)[name]

    def _gathered(self, item: torch.Tensor | None) -> torch.Tensor | None:
        """Return the whole of what ranks hold in parts, or all alike; None where none holds any."""
        local = local_part(item)
        start = item.start if isinstance(item, FlatShard) else 0
        numel = item.numel() if item is not None else 0
        if self._engine.num_processes == 1:
            return local.float().clone() if local is not None else None
        device = self._engine.device
        sizes = torch.tensor([local.numel() if local is not None else 0, numel], device=device)
        held = sizes[:1].clone()
        dist.all_reduce(held)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        total, whole_numel = int(held), int(sizes[1])
        if not total:
            return None
        if total == whole_numel * self._engine.num_processes and local is not None:
            return local.float().clone()
        whole = torch.zeros(whole_numel, dtype=torch.float32, device=device)
        if local is not None:
            whole[start : start + local.numel()] = local
        dist.all_reduce(whole)
        return whole


@contextmanager
def gathered(engine: Engine, model: nn.Module, params: list[torch.Tensor], modifier_rank: int | None) -> Iterator[None]:
    """Enter with whole parameters; what rank `modifier_rank` writes to `params` is kept on all ranks. Collective."""
    whole = Whole(engine, model)
    written: dict[str, torch.Tensor] = {}
    with engine.full_parameters(model):
        before = [param.detach().clone() for param in params] if modifier_rank is not None else []
        yield
        for param, old in zip(params, before, strict=False):
            assert modifier_rank is not None
            value = param.detach().clone()
            if engine.num_processes > 1:
                dist.broadcast(value, src=modifier_rank)
                dist.broadcast(old, src=modifier_rank)
            name = whole.name_of(param)
            # What was not written keeps its fp32 master, which is finer than the parameter.
            if name is not None and not torch.equal(value, old):
                written[name] = value
    if written:
        whole.write(written)


def _entry(item: Any) -> Entry:
    if isinstance(item, torch.Tensor):
        return Entry(item.shape, item.dtype, value=None if item.dim() else float(item))
    return Entry(torch.Size(()), torch.float64, number=item)


def local_part(item: torch.Tensor | None) -> torch.Tensor | None:
    """Return this rank's flat range of an item; of a home outside of memory it is a copy."""
    if isinstance(item, FlatShard):
        return item.read()
    return item.detach().reshape(-1) if item is not None else None


@torch.no_grad()
def put_local(item: torch.Tensor, flat: torch.Tensor) -> None:
    """Write this rank's flat range of an item."""
    if isinstance(item, FlatShard):
        item.write(0, flat)
    else:
        item.copy_(flat.view(item.shape))


def _put(item: torch.Tensor, value: torch.Tensor) -> None:
    flat = value.detach().reshape(-1)
    if isinstance(item, FlatShard):
        if item.length:
            put_local(item, flat[item.start : item.start + item.length])
    else:
        put_local(item, flat)
