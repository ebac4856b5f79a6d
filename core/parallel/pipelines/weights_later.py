"""The weights' part of a backward, put off: what a zero-bubble schedule fills its gaps with (arXiv 2405.15362, W).

While it is on, each matrix product with a parameter, `F.linear` or `torch.addmm`, computes in backward the gradients
of its input and bias alone, and keeps what the weight's gradient is made of. `finish` makes them, through autograd as
ever: what hangs on a parameter's gradient sees no difference. Whatever else a module computes is not put off, nor what
is computed again in backward: a checkpoint compares what both forwards saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Pair = tuple[nn.Parameter, torch.Tensor, torch.Tensor]


class WeightsLater(TorchFunctionMode):
    """Entered around forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.is_putting_off = False
        """Whether the backward that runs is the schedule's own: a model may ask for gradients of its own in forward."""
        self._kept: list[Pair] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put off the weights' gradients of matrix products; all else is as ever."""
        kwargs = kwargs or {}
        if func is F.linear and _can_wait(*args, **kwargs):
            return _of_linear(self, *args, **kwargs)
        if func is torch.addmm and not kwargs and len(args) == 3 and _can_wait(args[1], args[2], args[0]):
            bias, x, weight = args  # weight as (in, out)
            return _Product.apply(x, weight, bias, self, True)
        return func(*args, **kwargs)

    @contextmanager
    def putting_off(self) -> Iterator[None]:
        """Run a backward of the schedule's inside."""
        self.is_putting_off = True
        try:
            yield
        finally:
            self.is_putting_off = False

    def take(self) -> list[Pair]:
        """Return what the backward since the last `take` has left to do."""
        kept, self._kept = self._kept, []
        return kept

    def keep(self, weight: nn.Parameter, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Remember that the gradient of `weight` is `rows.T @ columns`."""
        self._kept.append((weight, rows, columns))


def finish(kept: list[Pair]) -> None:
    """Add the weights' gradients, by a backward of their own."""
    if kept:
        ends = [_Gradient.apply(weight, rows, columns) for weight, rows, columns in kept]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])


def _can_wait(input: Any = None, weight: Any = None, bias: Any = None) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and weight.requires_grad
        and not weight._backward_hooks  # they would be given none
        and weight.dim() == 2
        and torch.is_grad_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch._C._are_functorch_transforms_active()
        and isinstance(input, torch.Tensor)
        and input.dtype == weight.dtype
        and (bias is None or (isinstance(bias, torch.Tensor) and bias.dim() == 1))
        and not torch.is_autocast_enabled(weight.device.type)
    )


def _of_linear(later: WeightsLater, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return _Product.apply(input, weight, bias, later, False)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, or with `is_in_out` x @ weight + bias, over the last dimension of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, later: WeightsLater, is_in_out: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.is_in_out = later, is_in_out
        return torch.addmm(bias, x, weight) if is_in_out else F.linear(x, weight, bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            for_x = grad @ (weight.t() if ctx.is_in_out else weight)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            pair = (rows, flat) if ctx.is_in_out else (flat, rows)
            if ctx.later.is_putting_off:
                ctx.later.keep(weight, *pair)
            else:
                for_weight = pair[0].t() @ pair[1]
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_x, for_weight, for_bias, None, None


class _Gradient(torch.autograd.Function):
    """Zero, whose backward brings `rows.T @ columns` to `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.columns = rows, columns
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        found = ctx.rows.t() @ ctx.columns
        ctx.rows = ctx.columns = None
        return found, None, None
