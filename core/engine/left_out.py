"""Optimizers that did not go through `prepare`, and step an engine's parameters all the same."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distui.core.backends.base import Backend
from distui.core.errors import UserError
from distui.core.sharding.optim.prepared import PreparedOptimizer


class Trains(Protocol):
    """What of an engine is looked at."""

    backend: Backend
    _models: list[nn.Module]
    _optimizers: list[PreparedOptimizer]
    _unstepped: bool


_ENGINES: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_steps(engine: Trains) -> None:
    """Refuse steps of optimizers that `engine` does not know, where plain torch's numbers would not come out."""
    if not _ENGINES and not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))
    _ENGINES.add(engine)


_watching: list[Any] = []


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, PreparedOptimizer):
        return
    for engine in list(_ENGINES):
        if any(prepared.inner is optimizer for prepared in engine._optimizers):
            continue
        given = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for name, param in _trained(engine):
            if id(param) not in given:
                continue
            if reason := engine.backend.why_not_left_out(param):
                raise UserError(
                    f"{type(optimizer).__name__} steps {name}, and did not go through prepare",
                    reason,
                    "prepare it with its model, or with the module that was added to that: "
                    "module, optimizer = engine.prepare(module, optimizer)",
                )
            engine._unstepped = False  # its gradients are stepped
            break


def _trained(engine: Trains) -> list[tuple[str, torch.Tensor]]:
    named = [named for model in engine._models for named in nn.Module.named_parameters(model)]
    now = {id(param): name for name, param in named}
    gone = [(now.get(id(new), "a parameter"), old) for old, new in engine.backend.replaced.values()]
    return [*((name, old) for name, old in gone if id(old) not in now), *named]
