"""`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` on a prepared model: what they are given is a part.

A script that was written for plain torch clips with these. Where a rank holds only parts of gradients, or under a loss
scale, they would clip by another norm, and nobody would see. So for parameters of a prepared model they are the
engine's own; for all others they are what they were. A name that was imported before is the same function still.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad

from distui.core.errors import UserError


class Clips(Protocol):
    """What an engine is to this file."""

    _models: list[nn.Module]

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor | None:
        """Clip by the global norm. Collective."""

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every element. Collective."""


_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def route_clipping(engine: Clips) -> None:
    """Have torch's clipping functions ask `engine` for the parameters of its models."""
    _engines.add(engine)
    for function, act in ((clip_grad.clip_grad_norm_, _norm), (clip_grad.clip_grad_value_, _value)):
        _route(function, act)


def _route(function: Any, act: Callable[..., Any]) -> None:
    # Both are wrapped in a closure that turns gradients off; what is wrapped is exchanged, so every name of it follows.
    cells = [cell for cell in function.__closure__ or () if callable(cell.cell_contents)]
    if len(cells) != 1 or hasattr(cells[0].cell_contents, "distui_routed"):
        return
    plain = cells[0].cell_contents

    def routed(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        engine = _engine_of(given)
        return plain(given, *args, **kwargs) if engine is None else act(engine, given, *args, **kwargs)

    routed.distui_routed = True  # type: ignore[attr-defined]
    cells[0].cell_contents = routed


def _engine_of(params: Iterable[torch.Tensor]) -> Any:
    given = {id(param) for param in params}
    for engine in list(_engines):
        held = {id(param) for model in engine._models for param in model.parameters()} & given
        if not held:
            continue
        if held != given:
            raise UserError(
                "clipping parameters of a prepared model together with others",
                f"{len(held)} of {len(given)} belong to a model that engine.prepare returned",
                "prepare every model whose gradients are clipped together, or clip them apart",
            )
        return engine
    return None


def _norm(
    engine: Clips,
    parameters: list[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    norm = engine.clip_grad_norm_(parameters, max_norm, norm_type)
    if norm is None:  # gradients accumulate
        return torch.zeros(())
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {norm.item()}: nothing can be clipped")
    return norm


def _value(engine: Clips, parameters: list[torch.Tensor], clip_value: float, foreach: bool | None = None) -> None:
    engine.clip_grad_value_(parameters, clip_value)
