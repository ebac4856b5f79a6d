"""The part of `Accelerator` that asks who and where this process is, and talks to the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from distui.compat.accelerate.state import AcceleratorState, GradientState
from distui.compat.accelerate.utils import operations
from distui.compat.accelerate.utils.axes import ParallelismConfig
from distui.compat.accelerate.utils.enums import DistributedType
from distui.core.engine.engine import Engine
from distui.core.errors import UserError
from distui.core.ranks import ops


def join_axes(engine: Engine, state: AcceleratorState, given: ParallelismConfig | None) -> None:
    """Have the face's states know who shares a batch, and the mesh of the axes. Collective.

    Raises: UserError where the script (`given`) and the settings say different sizes.
    """
    strategy, axes = engine.config.strategy, engine.backend.axes
    tensor, context = strategy.tensor_parallel, strategy.context_parallel
    if given is not None and (given.tp_size, given.shared_sequence) != (tensor, context):
        raise UserError(
            f"ParallelismConfig(tp_size={given.tp_size}, cp_size={given.cp_size}, sp_size={given.sp_size})",
            f"the settings of the job say strategy.tensor_parallel={tensor}, strategy.context_parallel={context}",
            "take one of the two out",
        )
    if given is None and axes is not None and strategy.pipeline_parallel == 1:
        shards = engine.num_data_ranks if strategy.zero_stage == 3 else 1
        given = ParallelismConfig(engine.num_data_ranks // shards, shards, tp_size=tensor, cp_size=context)
    ranks = range(engine.num_processes)
    state._partial.follow(engine, [axes.sizes.place(rank)["dp"] if axes is not None else rank for rank in ranks])
    state.parallelism_config = given
    mesh: DeviceMesh | None = None
    if given is not None:
        has_axes = given.total_size > 1
        given.settle(engine.num_processes)
        mesh = given.get_device_mesh(engine.device.type) if has_axes else None
    state.device_mesh = mesh


class Ranks:
    """Which rank this is, and collectives."""

    engine: Engine
    state: AcceleratorState
    gradient_state: GradientState

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.engine.device

    @property
    def distributed_type(self) -> DistributedType:
        """What the ranks run on."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """Ranks of the job."""
        return self.engine.num_processes

    @property
    def process_index(self) -> int:
        """This rank, from 0."""
        return self.engine.process_index

    @property
    def local_process_index(self) -> int:
        """This rank among those of its node, from 0."""
        return self.engine.local_process_index

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.engine.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is its node's first rank."""
        return self.engine.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.engine.is_last_process

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.engine.use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether there are several ranks, each with a model of its own."""
        return self.use_distributed and self.distributed_type in (
            DistributedType.MULTI_GPU,
            DistributedType.MULTI_CPU,
        )

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on rank 0 only."""
        return self.engine.on_main_process(function) if function is not None else self.engine.on_main_process

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on each node's first rank only."""
        if function is None:
            return self.engine.on_local_main_process
        return self.engine.on_local_main_process(function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run on the highest rank only."""
        return self.engine.on_last_process(function)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorate a function to run on one rank only."""
        return self.engine.on_process(function, process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorate a function to run on one rank of each node only."""
        here = self.local_process_index == local_process_index
        if function is None:
            return lambda decorated: self.engine._only(here, decorated)
        return self.engine._only(here, function)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on rank 0 first. Collective."""
        return self.engine.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on each node's first rank first. Collective."""
        return self.engine.local_main_process_first()

    def wait_for_everyone(self) -> None:
        """Return when every rank has called it. Collective."""
        self.engine.wait_for_everyone()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Enter with this rank's part of `inputs`."""
        return self.state.split_between_processes(inputs, apply_padding)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once a node."""
        self.state.print(*args, **kwargs)

    def set_trigger(self) -> None:
        """Raise this rank's flag."""
        self.engine.set_trigger()

    def check_trigger(self) -> bool:
        """Return whether any rank has raised its flag, and lower it. Collective."""
        return self.engine.check_trigger()

    def gather(self, tensor: Any) -> Any:
        """Concatenate every data rank's tensors along dimension 0. Collective."""
        return operations.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather, without the samples that were repeated to even out the last batch. Collective."""
        num_real = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else -1
        if self.engine.num_data_ranks > 1:
            return ops.gather_for_metrics(input_data, num_real, use_gather_object, self.engine.data_group)
        return input_data

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Combine every data rank's tensors. Collective."""
        return operations.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad to the largest size over ranks. Collective."""
        return operations.pad_across_processes(tensor, dim, pad_index, pad_first)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write `obj` on rank 0: with `torch.save`, or a dict of tensors as safetensors."""
        from distui.compat.accelerate.utils.other import save

        each_node = self.project_configuration.save_on_each_node  # type: ignore[attr-defined]
        save(obj, f, save_on_each_node=each_node, safe_serialization=safe_serialization)
