"""Hooks that stay behind when a model is copied.

`copy.deepcopy(model)` and `torch.save(model)` take a module's hooks with it. Ours stand for the original's buffers and
process groups: a copy (an exponential average, a frozen reference) is a plain model and must not move them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def _inert(*args: Any, **kwargs: Any) -> None:
    """Do nothing: what a copy has in the place of a hook."""


def _in_a_copy() -> Callable[..., None]:
    return _inert


class Hook:
    """Calls `function`, outside of any compiled graph; its copy does nothing. `before_copy` may refuse the copy."""

    __slots__ = ("_before_copy", "_function")

    def __init__(self, function: Callable[..., Any], before_copy: Callable[[], None] = lambda: None) -> None:
        # A compiled block's graph must not take buffers and collectives in: it breaks here and goes on behind.
        self._function = torch.compiler.disable(function)
        self._before_copy = before_copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        self._before_copy()
        return _in_a_copy, ()


class WaitingParameters:
    """Stands for `model.named_parameters` and calls `wait` first; a copy of the model has its own method back."""

    __slots__ = ("_model", "_wait")

    def __init__(self, model: nn.Module, wait: Callable[[], None]) -> None:
        self._model, self._wait = model, wait

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._wait()
        return type(self._model).named_parameters(self._model, *args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._model, "named_parameters")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo[id(self._model)], "named_parameters")  # noqa: B009


class ClearingGradients:
    """Stands for `model.zero_grad` and forgets the flat gradients too; a copy has its own method back."""

    __slots__ = ("_discard", "_model")

    def __init__(self, model: nn.Module, discard: Callable[[], None]) -> None:
        self._model, self._discard = model, discard

    def __call__(self, set_to_none: bool = True) -> None:
        self._discard()
        type(self._model).zero_grad(self._model, set_to_none)

    def __reduce__(self) -> Any:
        return getattr, (self._model, "zero_grad")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo[id(self._model)], "zero_grad")  # noqa: B009
