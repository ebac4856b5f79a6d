"""Frozen weights that are tensor subclasses (torchao's int8, int4, fp8), as the plain tensors that they are made of.

The engine shards, sends and saves plain memory. So such a weight becomes a parametrization of torch's: its parts are
frozen parameters of the module, and reading the weight puts them together again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distui.core.errors import UserError


class _Together(nn.Module):
    """Makes a tensor subclass of its parts; parts may be subclasses themselves."""

    def __init__(self, whole: torch.Tensor) -> None:
        super().__init__()
        self._kind = type(whole)
        self._names, self._context = whole.__tensor_flatten__()  # type: ignore[attr-defined]
        self._size, self._stride = whole.size(), whole.stride()
        parts = [getattr(whole, name) for name in self._names]
        self._inner = [_Together(part) if _is_made(part) else None for part in parts]

    def forward(self, *plain: torch.Tensor) -> torch.Tensor:
        """Return the subclass that `right_inverse` took apart."""
        left = list(plain)
        parts = {}
        for name, inner in zip(self._names, self._inner, strict=True):
            count = inner.num_parts if inner is not None else 1
            taken, left = left[:count], left[count:]
            parts[name] = inner(*taken) if inner is not None else taken[0].detach()
        made: torch.Tensor = self._kind.__tensor_unflatten__(parts, self._context, self._size, self._stride)  # type: ignore[attr-defined]
        return made

    @property
    def num_parts(self) -> int:
        """How many plain tensors it is made of."""
        return sum(inner.num_parts if inner is not None else 1 for inner in self._inner)

    def right_inverse(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Return the plain tensors that `whole` is made of."""
        found: list[torch.Tensor] = []
        for name, inner in zip(self._names, self._inner, strict=True):
            part = getattr(whole, name)
            found += inner.right_inverse(part) if inner is not None else [part]
        return found


def _is_made(tensor: Any) -> bool:
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def apply_plain_parts(model: nn.Module) -> int:
    """Take apart every parameter of `model` that is a tensor subclass, in place; returns how many.

    Raises: UserError for one that is trained: a step would change its parts one by one.
    """
    found = [
        (module, name, param, f"{path}.{name}" if path else name)
        for path, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
        if _is_made(param)
    ]
    for _, _, param, path in found:
        if param.requires_grad:
            raise UserError(
                f"the parameter {path} is a {type(param.data).__name__} and is trained",
                "its numbers are made of several tensors, and a step of an optimizer is of one",
                "freeze it with requires_grad_(False) and train adapters, or quantize after training",
            )
    for module, name, param, _ in found:
        parametrize.register_parametrization(module, name, _Together(param.data), unsafe=True)
        for part in module.parametrizations[name].parameters():
            part.requires_grad_(False)
    return len(found)
