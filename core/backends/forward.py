"""Sends a model's forward through another engine's wrapper, while the model itself stays what the script holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distui.core.ranks.precision import cast_floating


class Body(nn.Module):
    """What a wrapper wraps: the model, by its own forward, under autocast to `dtype` where there is one."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self._run: Callable[..., Any] = model.forward
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; under autocast outputs are float32 again."""
        if self._dtype is None:
            return self._run(*args, **kwargs)
        device = next((param.device.type for param in self.model.parameters()), "cpu")
        with torch.autocast(device, dtype=self._dtype):
            output = self._run(*args, **kwargs)
        return cast_floating(output, torch.float32)


class Through:
    """Stands for `model.forward`: calls `wrapper`, whose body calls the model's own. Hooks of the model run once.

    A copy of the model has its class's forward back: it is a plain model, and must not send anything.
    """

    __slots__ = ("__wrapped__", "_model", "_own", "wrapper")

    def __init__(self, model: nn.Module, wrapper: Callable[..., Any]) -> None:
        self._model, self.wrapper = model, wrapper
        self._own = model.__dict__.get("forward")
        # `inspect.signature` follows it: libraries look up what a model's forward takes.
        self.__wrapped__ = model.forward
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _own_forward, (self._model, self._own)

    def restore(self) -> None:
        """Give the model its own forward back."""
        del self._model.__dict__["forward"]
        if self._own is not None:
            self._model.forward = self._own


def _own_forward(model: nn.Module, own: Callable[..., Any] | None) -> Callable[..., Any]:
    return own if own is not None else getattr(type(model), "forward").__get__(model)  # noqa: B009


def restore_forward(model: nn.Module) -> None:
    """Give `model` its own forward back, where it leads through a wrapper."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, Through):
        forward.restore()
