"""`PipelineModule`: a model as a row of layers, which the engine divides into stages.

Every rank builds all layers, and `initialize` leaves it those of its stage; parameters keep DeepSpeed's names. A layer
is a block of the engine's pipeline, whatever its class, so nothing lies around the blocks.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from distui.compat.deepspeed import checkpointing, comm
from distui.compat.deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    ProcessTopology,
)
from distui.compat.not_offered import NotOffered
from distui.core.axes.schedules import split
from distui.core.parallel.pipelines.stages import OWN_PARTS
from distui.core.sharding.units.partition import OWN_BLOCKS


class PipelineError(Exception):
    """A use of a pipelined engine that is none."""


class LayerSpec:
    """A layer that is not built yet: its class, and what that is called with."""

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs
        if not issubclass(typename, nn.Module):
            raise RuntimeError("LayerSpec only supports torch.nn.Module types.")
        self.global_rank = comm.get_rank() if comm.is_initialized() else -1

    def __repr__(self) -> str:
        given = [*map(repr, self.module_args), *(f"{key}={value!r}" for key, value in self.module_kwargs.items())]
        return f"{self.typename.__name__}({', '.join(given)})"

    def build(self, log: bool = False) -> nn.Module:
        """Return the layer."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that is one and the same wherever its `key` stands; `forward_fn(module, input)` is how it is used here.

    The whole module is shared, not only what `tied_weight_attr` names.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | list[str] = "weight",
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else tied_weight_attr


class _Layer(nn.Module):
    """One place in the row: a module, or a function, and how it is called."""

    def __init__(self, module: nn.Module | None, call: Callable[[Any], Any], seed_fn: Callable[[int], Any]) -> None:
        super().__init__()
        self.module = module
        self.call, self.seed_fn = call, seed_fn

    def forward(self, inputs: Any, seed: int | None = None) -> Any:
        if seed is not None:
            self.seed_fn(seed)
        # A tuple of one travels as DeepSpeed hands it on: unwrapped.
        return self.call(inputs[0] if type(inputs) is tuple and len(inputs) == 1 else inputs)


def set_random_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class PipelineModule(nn.Module):
    """A row of layers, each given what the one before gave: a tensor, or a tuple of tensors."""

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpointing.checkpoint,
        checkpointable_layers: list[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        """Build all layers; `deepspeed.initialize` divides them. Shapes may change with every micro-batch anyway.

        Raises: RuntimeError where the stages do not divide the ranks; NotOffered for ranks that share a layer by a
        topology, and for a function of one's own that recomputes.
        """
        super().__init__()
        if num_stages is None and topology is None:
            raise RuntimeError("must provide num_stages or topology")
        ranks = comm.get_world_size() if comm.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        rank = comm.get_rank() if comm.is_initialized() else int(os.environ.get("RANK", "0"))
        self.num_stages = int(topology.get_dim("pipe")) if topology is not None else int(num_stages or 1)
        if ranks % self.num_stages:
            raise RuntimeError(f"num_stages ({self.num_stages}) must divide distributed world size ({ranks})")
        self._topo = topology or PipeDataParallelTopology(self.num_stages, ranks // self.num_stages)
        if self._topo.get_dim("model") > 1 or self._topo.get_axis_names()[:2] != ["pipe", "data"]:
            raise NotOffered(
                f"a topology of {dict(zip(self._topo.axes, self._topo.dims, strict=True))} is not offered by distui",
                "stages lie outside, data-parallel ranks inside, and the engine itself cuts layers",
                'use PipeDataParallelTopology, and "tensor_parallel": {"autotp_size": N} in the JSON',
            )
        if activation_checkpoint_func not in (checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint):
            raise NotOffered(
                "PipelineModule(activation_checkpoint_func=...) is not offered by distui",
                "its engine recomputes layers with torch's own checkpoint",
                "leave it out; activation_checkpoint_interval says whether anything is recomputed",
            )
        self._grid = PipelineParallelGrid(self._topo, rank)
        self.global_rank, self.world_size, self.stage_id = rank, ranks, self._grid.get_stage_id()
        self.loss_fn, self.dynamic_shape = loss_fn, dynamic_shape
        self.seed_layers, self.seed_fn, self.base_seed = seed_layers, seed_fn, base_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.checkpointable_layers = checkpointable_layers
        self.micro_offset = 0
        self.tied_modules = nn.ModuleDict()
        self._layer_specs = list(layers)
        self._num_layers = len(self._layer_specs)
        vars(self)[OWN_BLOCKS] = [(str(index), self._built(index)) for index in range(self._num_layers)]
        self.parts = self._partitioned(partition_method)
        if self.num_stages > 1:
            vars(self)[OWN_PARTS] = [range(*ends) for ends in zip(self.parts, self.parts[1:], strict=False)]

    @property
    def forward_funcs(self) -> list[Any]:
        """All layers, as they are called."""
        return [layer for _, layer in vars(self)[OWN_BLOCKS]]

    def _built(self, index: int) -> _Layer:
        spec, seed_fn = self._layer_specs[index], self.seed_fn or set_random_seed
        if self.seed_layers:
            seed_fn(self.base_seed + index)
        if isinstance(spec, PipelineModule):
            raise NotImplementedError("RECURSIVE BUILD NOT YET IMPLEMENTED")
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in self.tied_modules:
                self.tied_modules[spec.key] = spec.build()
            tied = self.tied_modules[spec.key]
            return _Layer(tied, partial(spec.forward_fn, tied) if spec.forward_fn is not None else tied, seed_fn)
        module = spec.build() if isinstance(spec, LayerSpec) else spec
        if not isinstance(module, nn.Module):
            return _Layer(None, module, seed_fn)
        self.add_module(str(index), module)
        return _Layer(module, module, seed_fn)

    def _partitioned(self, method: str) -> list[int]:
        """Return where each stage begins, and the end. Raises: NotImplementedError, RuntimeError as DeepSpeed."""
        method, stages, count = method.lower(), self.num_stages, self._num_layers
        layers = self.forward_funcs
        if method == "uniform":
            costs = [1.0] * count
        elif method == "parameters":
            costs = [float(sum(p.numel() for p in layer.parameters() if p.requires_grad)) for layer in layers]
        elif method.startswith("type:"):
            wanted = re.compile(method.split(":")[1], re.IGNORECASE)
            costs = [float(bool(wanted.search(self._name(index)))) for index in range(count)]
            if not any(costs):
                raise RuntimeError(f"Partitioning '{method.split(':')[1]}' found no valid layers to partition.")
        else:
            raise NotImplementedError(f"Partitioning method {method} not implemented.")
        if count < stages:
            raise RuntimeError(f"{count} layers cannot be divided into num_stages={stages}: each has one at least")
        if method == "uniform":
            each, more = divmod(count, stages)
            return [stage * each + min(stage, more) for stage in range(stages + 1)]
        return [0, *(part.stop for part in split(costs, stages))]

    def _name(self, index: int) -> str:
        spec = self._layer_specs[index]
        if isinstance(spec, LayerSpec):
            return spec.typename.__name__
        return str(getattr(spec, "__name__", type(spec).__name__))

    def forward(self, forward_input: Any) -> Any:
        """Run all layers, or those of this rank's stage."""
        self.micro_offset += 1
        x = forward_input
        # As DeepSpeed, whose micro-batches count from 2 here: other numbers in each, the same when recomputed.
        base = self.base_seed * (self.micro_offset + 1)
        for index, layer in enumerate(self.forward_funcs):
            x = layer(x, base + index) if self.seed_layers else layer(x)
        return x

    # ---- what scripts ask ---------------------------------------------------------------------------------------

    def partitions(self) -> list[int]:
        """Return where each stage begins, and the end."""
        return self.parts

    def stage_owner(self, layer_idx: int) -> int:
        """Return the stage of a layer."""
        for stage in range(self.num_stages):
            if self.parts[stage] <= layer_idx < self.parts[stage + 1]:
                return stage
        raise RuntimeError(f"Layer {layer_idx} not owned? parts={self.parts}")

    def topology(self) -> ProcessTopology:
        """Return the topology."""
        return self._topo

    def mpu(self) -> PipelineParallelGrid:
        """Return what `initialize(mpu=...)` takes."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        """Return the number of stages."""
        return self.num_stages

    def set_checkpoint_interval(self, interval: int) -> None:
        """Say whether layers are recomputed; before `initialize`."""
        self.activation_checkpoint_interval = interval

    def get_additional_losses(self) -> None:
        """Return None: there are no more losses than the one."""
        return
