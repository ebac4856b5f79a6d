"""After each step: mixtures are balanced by the load of their experts, and how uneven that was goes to telemetry."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from distui.core.parallel.experts.moe import MoE, balance_experts, mixtures_of
from distui.core.parallel.experts.tokens import expert_load
from distui.core.telemetry.source import NullSource, TelemetrySource

EVERY_STEPS = 10
"""So often the load is told: reading it from a GPU waits for what that has still to do."""


class ExpertLoad:
    """The mixtures of an engine's models, found once."""

    def __init__(self) -> None:
        self._mixtures: weakref.WeakKeyDictionary[nn.Module, list[MoE]] = weakref.WeakKeyDictionary()
        self._counting: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Models that have experts whose load is counted."""

    def after_step(
        self,
        models: Sequence[nn.Module],
        stepped: Iterable[torch.optim.Optimizer],
        group: dist.ProcessGroup | None,
        telemetry: TelemetrySource | NullSource,
        step: int,
        was_skipped: bool,
    ) -> None:
        """Balance the mixtures of the `models` that were `stepped`; an overflow moves nothing. Collective: all ranks.

        `group` are the ranks whose tokens are others. Telemetry gets `experts.max_over_mean`: the tokens of the
        busiest expert over the mean, of the layer where that is most.
        """
        found = []
        for model in models:
            if model not in self._mixtures:
                self._mixtures[model] = [mixture for _, mixture in mixtures_of(model)]
                if self._mixtures[model] or expert_load(model):
                    self._counting.add(model)
            if self._mixtures[model] and (len(models) == 1 or _is_of(model, stepped)):
                found += self._mixtures[model]
        if was_skipped:
            for mixture in found:
                mixture.take_counts()
            return
        balance_experts(found, group)
        if self._counting and (step < EVERY_STEPS or step % EVERY_STEPS == 0):
            loads = [load for model in self._counting for load in expert_load(model).values() if sum(load)]
            if loads:
                uneven = max(max(load) * len(load) / sum(load) for load in loads)
                telemetry.metrics(step, {"experts.max_over_mean": uneven})


def _is_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    params = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    return any(id(param) in params for param in model.parameters())
