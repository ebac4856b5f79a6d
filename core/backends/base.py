"""What an engine must do so that a training script can run on it; plug-ins register theirs as `distui.backends`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.config import Config


class Backend(ABC):
    """Prepares models and optimizers, and owns what happens between `backward` and `step`.

    One instance serves one `distui.Engine`. Methods marked Collective must be called by all ranks.
    """

    name: str

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        """`group` is the data-parallel group; None where the script runs as one process."""
        self.config, self.group = config, group

    @abstractmethod
    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Make `model` train on this backend. Collective."""

    @abstractmethod
    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make `optimizer` step models that were prepared before it. Collective."""

    @abstractmethod
    def set_sync(self, sync: bool) -> None:
        """Say whether the coming backward is the last before the step."""

    @abstractmethod
    def before_backward(self) -> None:
        """Get ready for a backward."""

    @abstractmethod
    def end_backward(self) -> None:
        """Finish a backward, also for parameters that took no part in it. Collective."""

    @abstractmethod
    def clip_grad_norm_(self, params: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Clip by the global norm over all ranks, and return the norm before. Collective."""

    @abstractmethod
    def full_parameters(self, model: nn.Module, writeback: bool) -> AbstractContextManager[nn.Module]:
        """Give the model with whole, current parameters. Collective."""

    @abstractmethod
    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state. Collective."""

    @abstractmethod
    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state. Collective."""

    @abstractmethod
    def memory_by_category(self) -> dict[str, int]:
        """Return bytes of this rank by category."""

    @abstractmethod
    def take_exposed_s(self) -> float:
        """Return the seconds that this rank was blocked in collectives since the last call."""
