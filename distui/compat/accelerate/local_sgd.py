"""Local SGD (Stich, arXiv 1805.09767): ranks step on their own gradients and average weights now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from distui.compat.accelerate.refusals import NotOffered

if TYPE_CHECKING:
    from distui.compat.accelerate.accelerator import Accelerator


class LocalSGD:
    """Sends no gradients inside the block, and averages the weights every `local_sgd_steps` calls of `step`."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        """Raises NotOffered where the strategy shards anything: a rank must hold whole weights and states."""
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0
        self.accelerator, self.model, self.local_sgd_steps = accelerator, model, local_sgd_steps
        engine = accelerator.engine
        backend, stage = engine.backend, engine.config.strategy.zero_stage
        if self.enabled and (backend.name != "native" or stage > 0 or backend.axes is not None):
            raise NotOffered(
                "LocalSGD is not offered by distui here",
                f"the strategy is {engine.config.summary()}, and ranks step alone on whole weights",
                "use the native backend with strategy.zero_stage=0",
            )

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self._context: Any = self.accelerator.no_sync(self.model)
            self._context.__enter__()
            for optimizer in self.accelerator._optimizers:
                optimizer.gradient_factor = float(self.accelerator.num_processes)
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.enabled:
            return
        for optimizer in self.accelerator._optimizers:
            optimizer.gradient_factor = 1.0
        self._context.__exit__(*error)
        if error[0] is None:
            self._average()

    def step(self) -> None:
        """Count a step, and average the weights when it is time. Collective."""
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._average()

    def _average(self) -> None:
        with torch.no_grad(), self.accelerator.engine.full_parameters(self.model, writeback=True):
            for param in self.model.parameters():
                dist.all_reduce(param.data)
                param.data /= self.accelerator.num_processes
