"""The axes of a job, as its engine joins them: with none set every rank is data-parallel, and no group is made."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from distui.core.axes.groups import Axes
from distui.core.axes.sizes import AxisSizes
from distui.core.config.backends import axes_problems
from distui.core.config.check import rank_problems
from distui.core.config.schema import Config
from distui.core.errors import ConfigError
from distui.core.ranks.process import ProcessState

_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[AxisSizes, Axes]] = weakref.WeakKeyDictionary()
"""The axes that engines of this process have made, by the world that they are parts of."""


def join_axes(process: ProcessState, config: Config) -> Axes | None:
    """Make the groups of all axes and say which data rank `process` is; None where all ranks are data-parallel.

    Collective: all ranks. Raises: ConfigError where the sizes do not divide the world.
    """
    strategy = config.strategy
    if strategy.tensor_parallel * strategy.pipeline_parallel * strategy.context_parallel == 1:
        return None
    if problems := [*axes_problems(config), *rank_problems(config, process.num_processes)]:
        raise ConfigError(problems)
    sizes, world = AxisSizes.of(strategy, process.num_processes), dist.group.WORLD
    assert world is not None
    of_world = _known.setdefault(world, {})
    if sizes not in of_world:
        of_world[sizes] = Axes(sizes)
    axes = of_world[sizes]
    process.data_place = axes.index("data"), axes.size("data")
    process.data_group = axes["data"] or axes.alone
    return axes


def share_of_batch(axes: Axes | None) -> tuple[int, int]:
    """Return which of how many ranks that share a batch this is."""
    return (0, 1) if axes is None else (axes.index("model"), axes.size("model"))
