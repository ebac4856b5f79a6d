"""After each step: mixtures are balanced by the load of their experts, and how uneven that was goes to telemetry."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from distui.core.parallel.experts.moe import MoE, balance_experts, mixtures_of
from distui.core.telemetry.source import NullSource, TelemetrySource

EVERY_STEPS = 10
"""So often the load is told: reading it from a GPU waits for what that has still to do."""


class ExpertLoad:
    """The mixtures of an engine's models, found once."""

    def __init__(self) -> None:
        self._mixtures: weakref.WeakKeyDictionary[nn.Module, list[MoE]] = weakref.WeakKeyDictionary()

    def after_step(
        self,
        models: Iterable[nn.Module],
        group: dist.ProcessGroup | None,
        telemetry: TelemetrySource | NullSource,
        step: int,
        was_skipped: bool,
    ) -> None:
        """Balance the mixtures of `models`; a step that an overflow skipped moves nothing. Collective: all ranks.

        `group` are the ranks whose tokens are others. Telemetry gets `experts.max_over_mean`: the tokens of the
        busiest expert over the mean, of the layer where that is most.
        """
        found = []
        for model in models:
            if model not in self._mixtures:
                self._mixtures[model] = [mixture for _, mixture in mixtures_of(model)]
            found += self._mixtures[model]
        if was_skipped:
            for mixture in found:
                mixture.take_counts()
            return
        balance_experts(found, group)
        loads = [mixture.load.float() for mixture in found if mixture.load is not None]
        if loads and (step < EVERY_STEPS or step % EVERY_STEPS == 0):
            uneven = torch.stack([load.max() / load.mean().clamp_min(1e-20) for load in loads]).max()
            telemetry.metrics(step, {"experts.max_over_mean": float(uneven)})
