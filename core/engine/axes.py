"""The axes of a job, as its engine joins them: with none set every rank is data-parallel, and no group is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.groups import Axes
from distui.core.axes.sizes import AxisSizes
from distui.core.backends.base import Backend
from distui.core.backends.registry import load_backend
from distui.core.config.backends import axes_problems
from distui.core.config.batch import micro_size_of, solve_batch
from distui.core.config.check import rank_problems
from distui.core.config.schema import Config
from distui.core.errors import ConfigError
from distui.core.model.quantized import apply_plain_parts
from distui.core.parallel.outside import LossOutside
from distui.core.ranks.process import ProcessState


class Trains(Protocol):
    """What an engine is to this file."""

    config: Config
    num_micro: int

    def loss_factor(self, micro_batches: int | None = None) -> float:
        """Return what a loss is multiplied by for its backward."""


_known: tuple[dist.ProcessGroup | None, dict[AxisSizes, Axes]] = None, {}
"""The world that there is, and the axes that engines of this process have made of it."""


def join_axes(process: ProcessState, config: Config) -> Axes | None:
    """Make the groups of all axes and say which data rank `process` is; None where all ranks are data-parallel.

    Collective: all ranks. Raises: ConfigError where the sizes do not divide the world.
    """
    strategy = config.strategy
    model_ranks = strategy.tensor_parallel * strategy.pipeline_parallel * strategy.context_parallel
    if model_ranks * strategy.expert_parallel == 1 and strategy.shard_size in (0, process.num_processes):
        return None
    if problems := [*axes_problems(config), *rank_problems(config, process.num_processes)]:
        raise ConfigError(problems)
    sizes, world = AxisSizes.of(strategy, process.num_processes), dist.group.WORLD
    assert world is not None
    global _known
    if _known[0] is not world:
        _known = world, {}
    of_world = _known[1]
    if sizes not in of_world:
        of_world[sizes] = Axes(sizes)
    axes = of_world[sizes]
    process.data_place = axes.index("data"), axes.size("data")
    process.data_group = axes["data"] or axes.alone
    return axes


def batch_sizes(config: Config, num_data_ranks: int) -> tuple[int | None, int, int]:
    """Return the samples of a rank's batch, how many of them a step takes, and how many micro-batches each is cut into.

    A pipeline takes all micro-batches of a step as one batch.
    """
    batch = solve_batch(config.batch, num_data_ranks)
    micro_size, accumulation = micro_size_of(batch, num_data_ranks), batch.accumulation or 1
    if config.strategy.pipeline_parallel == 1:
        return micro_size, accumulation, 1
    return micro_size and micro_size * accumulation, 1, accumulation


def backend_of(engine: Trains, group: dist.ProcessGroup | None, axes: Axes | None) -> Backend:
    """Return the engine's backend, which shards over `group`."""
    backend = load_backend(engine.config, group)
    backend.axes, backend.num_micro, backend.loss_factor = axes, engine.num_micro, engine.loss_factor
    return backend


def take_given(
    backend: Backend, model: nn.Module, plan: Mapping[str, str] | None, loss: Callable[..., torch.Tensor] | None
) -> None:
    """Take what the script gave for `model`; a loss outside of it is put around its forward, or a pipeline's end.

    Frozen weights that are tensor subclasses become plain ones (`quantized.apply_plain_parts`).
    """
    apply_plain_parts(model)
    backend.plan, backend.loss_of = plan or {}, loss
    if loss is not None and backend.config.strategy.pipeline_parallel == 1:
        model.forward = LossOutside(model.forward, loss)


def cutting_group(backend: Backend) -> dist.ProcessGroup | None:
    """Return the ranks over which the backend's models and their losses are cut; None where logits stay whole."""
    return None if backend.axes is None or backend.config.strategy.gather_logits else backend.axes["tp"]


def share_of_batch(axes: Axes | None) -> tuple[int, int]:
    """Return which of how many ranks that share a batch this is."""
    return (0, 1) if axes is None else (axes.index("model"), axes.size("model"))
