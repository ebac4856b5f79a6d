"""Numbers that are not there: what stands for the output of a module that another stage holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def stand_in(
    module: nn.Module, forward: Callable[..., Any], shapes: dict[int, tuple[int, ...]], args: Any, kwargs: Any
) -> Any:
    """Return NaN of the shapes that `module` would give, which are worked out without numbers.

    `shapes` are those of its parameters where it is held, by identity.
    """
    device = next((tensor.device for tensor in _tensors((args, kwargs))), torch.device("cpu"))
    own = dict(module._parameters)
    for key, param in own.items():
        if param is not None:
            blank = torch.empty(shapes[id(param)], dtype=param.dtype, device="meta")
            module._parameters[key] = nn.Parameter(blank, requires_grad=False)
    try:
        with torch.no_grad():
            args, kwargs = _mapped((args, kwargs), lambda tensor: tensor.to("meta"))
            output = forward(*args, **kwargs)
    finally:
        module._parameters.update(own)
    return _mapped(output, functools.partial(_placeholder, device))


def blank(value: Any) -> Any:
    """Return NaN of the shapes of all tensors in `value`."""
    return _mapped(value, lambda tensor: _placeholder(tensor.device, tensor))


def has_nan(value: Any) -> bool:
    """Tell whether any tensor in `value` has one."""
    return any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in _tensors(value))


def _placeholder(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _mapped(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: act(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
