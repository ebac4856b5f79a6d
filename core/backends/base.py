"""What an engine must do so that a training script can run on it; plug-ins register theirs as `distui.backends`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.axes.groups import Axes
from distui.core.backends.beside import Beside
from distui.core.config.schema import Config
from distui.core.errors import Problem
from distui.core.sharding.optim.prepared import PreparedOptimizer
from distui.core.sharding.start.start import Start

Part = tuple[int, int]
"""Which of how many equal parts a rank writes of what every rank holds; load has none and takes the whole."""


class Backend(Beside, ABC):
    """Prepares models and optimizers, and owns what happens between `backward` and `step`.

    One instance serves one `distui.Engine`. Methods marked Collective must be called by all ranks. A backend whose
    models keep plain tensors has most of this in `distui.core.backends.plain.PlainBackend`.
    """

    brings_models = False
    """Whether `prepare_model` brings the model of `start` to the device itself; else it finds it there, whole."""
    start: Start | None = None
    """Where the numbers of the model that is being prepared come from, and which device they go to."""
    optimizer_of: Mapping[int, int] = MappingProxyType({})
    """Which of the optimizers that are prepared together with a model steps a parameter, by its identity."""

    axes: Axes | None = None
    """Where several ranks share a batch: the groups of all axes; `group` is then the one that shards states."""
    cuts: Mapping[int, Cut] = MappingProxyType({})
    """Which parameters of the prepared models are pieces of whole ones, by identity."""
    plan: Mapping[str, str] = MappingProxyType({})
    """How the script has the model that is being prepared cut over tensor-parallel ranks; empty leaves it to others."""

    loss_of: Callable[..., torch.Tensor] | None = None
    """What computes the loss outside of the model that is being prepared, where the script gave that to prepare."""
    num_micro = 1
    """Into how many micro-batches a pipeline cuts what the model is called with."""
    loss_factor: Callable[[], float] = staticmethod(lambda: 1.0)
    """What a loss is multiplied by for its backward."""

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        """`group` is the data-parallel group; None where the script runs as one process."""
        self.config, self.group = config, group

    @classmethod
    def check(cls, config: Config, num_ranks: int) -> list[Problem]:
        """Return what this backend cannot do of `config`; of ours `core.config.backends` tells it sooner."""
        return []

    # ---- training ------------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Make `model` train on this backend in `precision.dtype`, taking any and giving fp32 outputs. Collective.

        The same object should come back: scripts use its attributes and the names of its parameters.
        """

    @abstractmethod
    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """Make `optimizer` step models that were prepared before it. Collective."""

    @abstractmethod
    def set_sync(self, sync: bool) -> None:
        """Say whether the coming forward and backward are the last before the step."""

    def before_backward(self) -> None:
        """Get ready for a backward."""

    def backward(self, loss: torch.Tensor, factor: float, **kwargs: Any) -> None:
        """Compute the gradients of `loss` times `factor`. Collective."""
        (loss * factor if factor != 1.0 else loss).backward(**kwargs)

    def end_backward(self) -> None:
        """Finish a backward, also for parameters that took no part in it. Collective."""

    @abstractmethod
    def clip_grad_norm_(self, params: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Clip by the global norm over all ranks, and return the norm before. Collective."""

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give the gradients that the next step uses by name; what is changed or replaced in it is kept. Collective."""
        params = dict(nn.Module.named_parameters(model))
        found = {name: param.grad for name, param in params.items() if param.grad is not None}
        yield found
        for name, grad in found.items():
            params[name].grad = grad

    # ---- whole weights -------------------------------------------------------------------------------------------

    @abstractmethod
    def full_parameters(self, model: nn.Module, writeback: bool) -> AbstractContextManager[nn.Module]:
        """Give the model with whole, current parameters. Collective."""

    @abstractmethod
    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state. Collective."""

    @abstractmethod
    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state. Collective."""

    # ---- checkpoints: what a rank holds, by the parameters' names -------------------------------------------------

    @abstractmethod
    def model_items(self, model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name, in the memory that training uses. Collective.

        Parameters are `FlatShard`s of the fp32 copies, where there are such. With `part` a rank gives only its part of
        what others hold as well; without, all that it holds.
        """

    @abstractmethod
    def optimizer_items(self, optimizer: PreparedOptimizer, part: Part | None) -> dict[str, Any]:
        """Return states by `<parameter>.<state>`: `FlatShard`s as of parameters, other tensors whole, and numbers."""

    @abstractmethod
    def allocate_states(self, optimizer: PreparedOptimizer, saved: Mapping[str, Any]) -> None:
        """Let an optimizer have exactly the states in `saved`, by name: of that size and dtype, or with a number."""

    @abstractmethod
    def loaded(self, model: nn.Module) -> None:
        """Go on with what was written into the tensors of `model_items`. Collective."""

    def param_shapes(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the whole shape of every parameter by name, each once."""
        named = dict(nn.Module.named_parameters(model))
        return {name: list(self.cuts[id(p)].shape if id(p) in self.cuts else p.shape) for name, p in named.items()}

    # ---- accounting ----------------------------------------------------------------------------------------------

    @abstractmethod
    def memory_by_category(self) -> dict[str, int]:
        """Return bytes of this rank by category: parameters, gradients, optimizer_states, buffers."""

    def take_exposed_s(self) -> float:
        """Return the seconds that this rank was seen blocked in collectives since the last call."""
        return 0.0

    def free(self) -> None:
        """Let go of all models and optimizers."""
