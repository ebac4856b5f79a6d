"""Numbers that are not there: what stands for the output of a module that another stage holds.

Floating ones are NaN, and what is computed of them is. Whole numbers and truth values have no such value: these, and
what becomes of them, stay `Absent`. Nothing that is absent turns into a number of Python, or into numbers that are
there, unseen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.units.guarded import DESCRIBES

_READS = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.equal, torch.equal, torch.is_nonzero),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.Tensor.__array__, torch.Tensor.__contains__, torch.Tensor.allclose, torch.allclose),
    *(torch.Tensor.is_nonzero, torch.Tensor.__complex__),
}
_OF_SHAPES = ("type_as", "expand_as", "view_as", "reshape_as")
"""What asks its second tensor for no number, as all that ends with _like or begins with new_ asks none at all."""


class Absent(torch.Tensor):
    """A tensor of the right shape and format without its numbers, which are on another stage."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _READS:
            raise _unseen(f"{name} of it")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        is_of_shapes = name in _OF_SHAPES and not isinstance(args[0], Absent)
        if func in DESCRIBES or name.endswith("_like") or name.startswith("new_") or is_of_shapes:
            return found
        given = list(_tensors((args, kwargs)))
        if name in ("__setitem__", "copy_") or any(found is one for one in given):
            into = args[0]
            if not isinstance(into, Absent) and not into.is_floating_point():
                raise _unseen(f"{name} with it into what is not")
        spoilt = any(isinstance(one, Absent) and not one.is_floating_point() for one in given)
        return _mapped(found, functools.partial(_as_absent, spoilt))


def _as_absent(spoilt: bool, tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        if spoilt and tensor.is_floating_point():  # of numbers that are there, chosen by some that are not
            tensor = torch.full_like(tensor, torch.nan)
        return tensor if isinstance(tensor, Absent) else tensor.as_subclass(Absent)


def _unseen(what: str) -> UserError:
    return UserError(
        f"{what}: a tensor that an embedding on another stage of the pipeline gives",
        "a rank has the shape of what modules in front of its first block give, and none of its numbers",
        "compute it of the model's inputs in front of that module, or hand it on inside the blocks' outputs, or set "
        "strategy.pipeline_parallel to 1",
    )


def stand_in(
    module: nn.Module, forward: Callable[..., Any], shapes: dict[int, tuple[int, ...]], args: Any, kwargs: Any
) -> Any:
    """Return what is absent, of the shapes that `module` would give, which are worked out without numbers.

    `shapes` are those of its parameters where it is held, by identity. Raises: UserError where they depend on numbers.
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
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{type(module).__name__} is on another stage, and what it gives has a shape that depends on numbers",
            f"this rank works out shapes without them, and {type(error).__name__} was raised: {error}",
            "let its forward read no numbers (item, tolist, bool, boolean indices), or set "
            "strategy.pipeline_parallel to 1",
        ) from error
    finally:
        module._parameters.update(own)
    return _mapped(output, functools.partial(_placeholder, device))


def blank(value: Any) -> Any:
    """Return what is absent, of the shapes of all tensors in `value`."""
    return _mapped(value, lambda tensor: _placeholder(tensor.device, tensor))


def is_absent(value: Any) -> bool:
    """Tell whether numbers of any tensor in `value` are on another stage."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(
            bool(tensor.isnan().any()) if tensor.is_floating_point() else isinstance(tensor, Absent)
            for tensor in _tensors(value)
        )


def _placeholder(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        filled = torch.nan if tensor.is_floating_point() else 0
        return torch.full(tensor.shape, filled, dtype=tensor.dtype, device=device).as_subclass(Absent)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _mapped(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: act(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
