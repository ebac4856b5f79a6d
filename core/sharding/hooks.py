"""Hooks that stay behind when a model is copied.

`copy.deepcopy(model)` and `torch.save(model)` take a module's hooks with it. Ours stand for the original's buffers and
process groups: a copy (an exponential average, a frozen reference) is a plain model and must not move them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from distui.core.sharding.units.guarded import GRAD, place_of


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


class ClearingGradients:
    """Stands for `model.zero_grad` and forgets the flat gradients too; a copy has its own method back."""

    __slots__ = ("_discard", "_model")

    def __init__(self, model: nn.Module, discard: Callable[[bool], None]) -> None:
        self._model, self._discard = model, discard

    def __call__(self, set_to_none: bool = True) -> None:
        self._discard(set_to_none)
        for param in self._model.parameters():
            # Others were forgotten with their units. Nobody reads those of another rank, not even to clear them.
            if place_of(param) is None and (grad := GRAD.__get__(param)) is not None:
                param.grad = None if set_to_none else torch.zeros_like(grad)

    def __reduce__(self) -> Any:
        return getattr, (self._model, "zero_grad")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo[id(self._model)], "zero_grad")  # noqa: B009


def unseen_by_modes() -> AbstractContextManager[Any]:
    """Have a selective checkpoint, which keeps what operations give to give it again, not see what is done inside."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    is_kept = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
    return _disable_current_modes() if is_kept else nullcontext()


def route_saving() -> None:
    """Have hooks that a script sets itself (`save_on_cpu`) get, of a prepared parameter, a tensor on its memory."""
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    plain = hooks.__enter__
    if hasattr(plain, "distui_routed"):
        return

    def enter(self: Any) -> Any:
        if not hasattr(self.pack_hook, "distui_routed"):
            self.pack_hook = by_alias(self.pack_hook)
        return plain(self)

    enter.distui_routed = True  # type: ignore[attr-defined]
    hooks.__enter__ = enter


def by_alias(pack: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """Give `pack` not a parameter, whose memory is NaN again after the operation, but a tensor on what it has now."""

    def pack_alias(tensor: torch.Tensor) -> Any:
        return pack(tensor.detach() if place_of(tensor) is not None else tensor)

    pack_alias.distui_routed = True  # type: ignore[attr-defined]
    return pack_alias
