"""`deepspeed.utils.groups`: the data-parallel group is the whole job."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from distui.compat.deepspeed.comm import get_rank, get_world_size


def _get_data_parallel_group() -> Any:
    return dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    return get_world_size()


def _get_data_parallel_rank() -> int:
    return get_rank()


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
