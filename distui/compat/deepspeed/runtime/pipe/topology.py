"""DeepSpeed's topologies: which rank lies where on named axes, the last one innermost; and what a stage asks of it."""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from typing import Any

import torch.distributed as dist

from distui.core.axes.groups import Axes


class ProcessTopology:
    """Coordinates of ranks on named axes, row-major."""

    def __init__(self, axes: list[str], dims: list[int]) -> None:
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]
        places: Any = itertools.product(*(range(size) for size in self.dims))
        self.mapping: dict[Any, int] = {self.ProcessCoord(*place): rank for rank, place in enumerate(places)}

    def get_axis_names(self) -> list[str]:
        """Return the axes, outermost first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Return the size of an axis, 0 where there is no such."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def world_size(self) -> int:
        """Return the number of ranks."""
        return math.prod(self.dims)

    def get_rank(self, **coord_kwargs: int) -> int:
        """Return the rank at a coordinate, of which every axis is named."""
        if len(coord_kwargs) != len(self.axes):
            raise ValueError("get_rank() does not support slices. Use filter_match())")
        return self.mapping[self.ProcessCoord(**coord_kwargs)]

    def get_coord(self, rank: int) -> Any:
        """Return the coordinate of a rank."""
        for place, found in self.mapping.items():
            if found == rank:
                return place
        raise ValueError(f"rank {rank} not found in topology.")

    def get_rank_repr(
        self, rank: int, omit_axes: Any = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """Return the coordinate of a rank as text, such as `model_00`."""
        place = self.get_coord(rank)
        named = [f"{axis}{inner_sep}{getattr(place, axis):02d}" for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(named)

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """Return the ranks whose coordinates are as given."""
        return [
            rank
            for place, rank in self.mapping.items()
            if all(getattr(place, axis) == value for axis, value in filter_kwargs.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Return the ranks at place `idx` of an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Return the groups of ranks that differ in `axis` only."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        places = itertools.product(*(range(self.get_dim(name)) for name in others))
        return [self.filter_match(**dict(zip(others, place, strict=True))) for place in places]

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Stages outside, data-parallel ranks inside."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """The same, with ranks that share each layer innermost."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """What scripts ask of the axes of a pipelined model; groups are there once `initialize` has made the engine."""

    def __init__(self, topology: ProcessTopology, rank: int) -> None:
        self._topo, self.global_rank = topology, rank
        self.axes: Axes | None = None
        self.data_parallel_size = max(topology.get_dim("data"), 1)
        self.pipe_parallel_size = max(topology.get_dim("pipe"), 1)
        self.model_parallel_size = max(topology.get_dim("model"), 1)
        place = topology.get_coord(rank)
        self.stage_id, self.data_parallel_id = place.pipe, place.data

    def topology(self) -> ProcessTopology:
        """Return the topology."""
        return self._topo

    def get_global_rank(self) -> int:
        """Return this rank."""
        return self.global_rank

    def get_stage_id(self) -> int:
        """Return this rank's stage."""
        return int(self.stage_id)

    get_pipe_parallel_rank = get_pipeline_model_parallel_rank = get_stage_id

    def get_data_parallel_id(self) -> int:
        """Return which batches this rank has."""
        return int(self.data_parallel_id)

    get_data_parallel_rank = get_data_parallel_id

    def get_pipe_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self.pipe_parallel_size

    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    def get_data_parallel_world_size(self) -> int:
        """Return the ranks with batches of their own."""
        return self.data_parallel_size

    def _group(self, kind: str) -> dist.ProcessGroup | None:
        if self.axes is None:
            return None
        return self.axes[kind] or self.axes.alone

    def get_pipe_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks of this rank's stages."""
        return self._group("pp")

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks with other batches and the same stage."""
        return self._group("data")

    def get_model_parallel_rank(self) -> int:
        """Return 0: layers are not cut by this topology."""
        return 0

    get_slice_parallel_rank = get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_slice_parallel_world_size(self) -> int:
        """Return 1."""
        return 1

    get_tensor_model_parallel_world_size = get_slice_parallel_world_size

    def get_model_parallel_world_size(self) -> int:
        """Return the ranks that share a batch."""
        return self.pipe_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share a batch."""
        return self._group("model")

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """Return the rank that has a stage for this rank's batches."""
        place = self._topo.get_coord(self.global_rank)._replace(pipe=stage_id, **kwargs)
        return self._topo.mapping[place]
