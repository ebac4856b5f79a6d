"""Whole parameters, optimizer states and gradients by the parameter: read and written at every stage and home.

What a rank holds comes from the backend as flat ranges by name (`FlatShard`), so nothing here knows a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from distui.core.backends.optimizer import PreparedOptimizer
from distui.core.checkpoint.flat import CellShard, FlatShard
from distui.core.engine import Engine


class Whole:
    """The whole tensors of one prepared model. Methods are Collective: all ranks, in the same order."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
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
        found = self._gathered(item)
        return found.view(self._shape(name)) if found is not None else None

    def write_states(self, optimizer: PreparedOptimizer, states: Mapping[str, torch.Tensor]) -> None:
        """Take whole states by `<parameter>.<state>`, making room for those that the optimizer has not yet."""
        metas = {
            # As checkpoints describe them: flattened.
            key: SimpleNamespace(
                size=torch.Size([value.numel()] if value.dim() else []),
                properties=SimpleNamespace(dtype=value.dtype),
            )
            for key, value in states.items()
        }
        self._engine.backend.allocate_states(optimizer, metas)
        for key, item in self._engine.backend.optimizer_items(optimizer, None).items():
            if key in states:
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


def local_part(item: torch.Tensor | None) -> torch.Tensor | None:
    """Return this rank's flat range of an item; of a home outside of memory it is a copy."""
    if isinstance(item, FlatShard):
        return item.__get_tensor_shard__(MetadataIndex(""))
    return item.detach().reshape(-1) if item is not None else None


@torch.no_grad()
def put_local(item: torch.Tensor, flat: torch.Tensor) -> None:
    """Write this rank's flat range of an item."""
    if isinstance(item, CellShard):
        item.cell.write(0, flat.to(item.dtype))
    elif isinstance(item, FlatShard):
        item.local.copy_(flat)
    else:
        item.copy_(flat.view(item.shape))


def _put(item: torch.Tensor, value: torch.Tensor) -> None:
    flat = value.detach().reshape(-1)
    if isinstance(item, FlatShard):
        if item.length:
            put_local(item, flat[item.start : item.start + item.length])
    else:
        put_local(item, flat)
