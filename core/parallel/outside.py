"""A loss that the script computes outside of its model, put where the model is called: a pipeline needs it there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from distui.core.ranks.precision import cast_floating


def named_by(loss: Callable[..., torch.Tensor]) -> frozenset[str]:
    """Return the keywords that `loss` takes beside the model's output: these go to it, all others to the model."""
    return frozenset(list(inspect.signature(loss).parameters)[1:])


class LossOutside:
    """Stands for a model's forward: gives `loss(output, ...)` where keywords of `loss` are given, else the output."""

    def __init__(self, forward: Callable[..., Any], loss: Callable[..., torch.Tensor]) -> None:
        self.__wrapped__, self._loss, self._names = forward, loss, named_by(loss)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for_loss = {key: kwargs.pop(key) for key in list(kwargs) if key in self._names}
        output = self.__wrapped__(*args, **kwargs)
        return self._loss(cast_floating(output, torch.float32), **for_loss) if for_loss else output
