"""Number formats: casting at the model's border, and fp16's loss scale."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_STRICT = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.LayerNorm,
    nn.GroupNorm,
)
"""Modules that take no input of another format than their weights'."""


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with every floating-point tensor in it cast to `dtype`."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, value)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    if len(args) == 1 and not kwargs and getattr(args[0], "dtype", None) == dtype:
        return None  # as nearly always: every layer of a model with wider buffers comes here
    return cast_floating(args, dtype), cast_floating(kwargs, dtype)


def _cast_output(module: nn.Module, args: Any, output: Any) -> Any:
    return cast_floating(output, torch.float32)


def apply_border_casts(model: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Make `model` take inputs of any floating format and give outputs in float32, while it computes in `dtype`.

    Where the model has buffers of a wider format, what they are added to becomes as wide; the modules that want their
    input in the format of their weights then cast it, as autocast would.

    Returns the hooks' handles. A copy of the model keeps the casts.
    """
    handles = [
        model.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True),
        model.register_forward_hook(_cast_output),
    ]
    if any(buffer.is_floating_point() and buffer.dtype != dtype for buffer in model.buffers()):
        strict = (module for module in model.modules() if isinstance(module, _STRICT) and module is not model)
        handles += [
            module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True) for module in strict
        ]
    return handles


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740, section 3.2).

    The scale doubles after `window` steps without overflow and halves at each overflow; that step is skipped.
    """

    def __init__(self, initial: float, window: int, minimum: float = 1.0) -> None:
        self.scale, self.window, self.minimum = initial, window, minimum
        self.good_steps = 0
        self.num_skipped = 0

    def update(self, overflow: bool) -> None:
        """Account one step."""
        if overflow:
            self.scale = max(self.scale / 2.0, self.minimum)
            self.good_steps = 0
            self.num_skipped += 1
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0 and math.isfinite(self.scale * 2.0):
            self.scale *= 2.0

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` takes."""
        return {"scale": self.scale, "good_steps": self.good_steps, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state` was taken."""
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
        self.num_skipped = int(state["num_skipped"])
