"""`deepspeed.utils.groups`: who has other batches, shares matrices, or shares sequences, of the newest engine."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist

from distui.compat.deepspeed.comm import get_rank, get_world_size
from distui.core.engine.engine import Engine

_newest: list[weakref.ref[Engine]] = []


def follow(engine: Engine) -> None:
    """Answer by this engine from now on."""
    _newest[:] = [weakref.ref(engine)]


def _axes() -> Any:
    engine = _newest[0]() if _newest else None
    return engine.backend.axes if engine is not None else None


def _group(kind: str, without: Any) -> Any:
    axes = _axes()
    return without if axes is None else axes[kind] or axes.alone


def _size(kind: str, without: int) -> int:
    axes = _axes()
    return without if axes is None else int(axes.size(kind))


def _rank(kind: str, without: int) -> int:
    axes = _axes()
    return without if axes is None else int(axes.index(kind))


def _get_data_parallel_group() -> Any:
    return _group("data", dist.group.WORLD)


def _get_data_parallel_world_size() -> int:
    return _size("data", get_world_size())


def _get_data_parallel_rank() -> int:
    return _rank("data", get_rank())


def _get_sequence_parallel_group() -> Any:
    return _group("cp", None)


def _get_sequence_parallel_world_size() -> int:
    return _size("cp", 1)


def _get_sequence_parallel_rank() -> int:
    return _rank("cp", 0)


def _get_sequence_data_parallel_group() -> Any:
    return _group("shard", dist.group.WORLD)


def _get_sequence_data_parallel_world_size() -> int:
    return _size("shard", get_world_size())


def _get_sequence_data_parallel_rank() -> int:
    return _rank("shard", get_rank())


def get_tensor_model_parallel_group() -> Any:
    """Return the ranks that share matrices; None without an engine that has such."""
    return _group("tp", None)


def get_tensor_model_parallel_world_size() -> int:
    """Return how many ranks share matrices."""
    return _size("tp", 1)


def get_tensor_model_parallel_rank() -> int:
    """Return this rank among those that share its matrices."""
    return _rank("tp", 0)


_get_model_parallel_world_size = get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank, get_model_parallel_group = get_tensor_model_parallel_rank, get_tensor_model_parallel_group
get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
