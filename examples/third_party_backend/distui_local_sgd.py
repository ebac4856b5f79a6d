"""Local SGD as a backend for distui: each rank steps alone, and every `AVERAGE_EVERY` steps the ranks average weights.

Ranks then talk once in so many steps instead of in each (Stich, arXiv 1805.09767). `PlainBackend` brings checkpoints,
clipping, loss scaling and the account of memory; what is left is what makes this backend another one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.plain import PlainBackend, PlainOptimizer
from distui.core.config.schema import Config
from distui.core.errors import Problem
from distui.core.sharding.transport.alike import start_alike

AVERAGE_EVERY = 4


class LocalSGDOptimizer(PlainOptimizer):
    """Steps this rank's own weights, and averages them over the ranks now and then."""

    num_steps = 0
    ranks: dist.ProcessGroup | None = None

    def apply(self, factor: float) -> None:
        """Step. Collective every `AVERAGE_EVERY` steps."""
        super().apply(factor)
        self.num_steps += 1
        if self.ranks is not None and self.num_steps % AVERAGE_EVERY == 0:
            weights = [param.detach() for param in self.params()]
            flat = torch.cat([weight.reshape(-1) for weight in weights])
            dist.all_reduce(flat, group=self.ranks)
            flat /= self.ranks.size()
            parts = flat.split([weight.numel() for weight in weights])
            torch._foreach_copy_(weights, [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)])


class LocalSGDBackend(PlainBackend):
    """Sends weights every few steps, and gradients never."""

    name = "local_sgd"

    @classmethod
    def check(cls, config: Config, num_ranks: int) -> list[Problem]:
        """Refuse what it cannot do, before it trains something else than was asked for."""
        if config.strategy.zero_stage == 0 and config.precision.dtype == "fp32":
            return []
        return [
            Problem(
                "strategy.backend",
                f"local_sgd with zero_stage={config.strategy.zero_stage} and dtype={config.precision.dtype}",
                "every rank trains all of the model, in fp32",
                "set strategy.zero_stage to 0 and precision.dtype to fp32",
            )
        ]

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Give all ranks the same start. Collective."""
        if self.group is not None:
            start_alike(model, self.group)
        return super().prepare_model(model)

    def make_optimizer(self, inner: torch.optim.Optimizer, sharded: bool) -> PlainOptimizer:
        """Return what steps and averages."""
        optimizer = LocalSGDOptimizer(inner, None)
        optimizer.ranks = self.group
        return optimizer
