"""`deepspeed.comm`: torch.distributed, whose collectives distui's ledger records, and DeepSpeed's own names."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp as ReduceOp

from distui.compat.deepspeed.refusals import PAGE
from distui.core.ranks.process import ProcessState


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the process group, making it where there is none yet; one process alone gets a group of its own."""
    if dist.is_initialized() or dist_init_required is False:
        return
    if init_method is not None:
        dist.init_process_group(
            dist_backend, init_method=init_method, timeout=timeout, rank=rank, world_size=world_size
        )
        return
    state = ProcessState()
    if not dist.is_initialized():
        backend = dist_backend or ("cpu:gloo,cuda:nccl" if state.device.type == "cuda" else "gloo")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def is_initialized() -> bool:
    """Return whether there is a process group."""
    return dist.is_initialized()


def get_rank(group: Any = None) -> int:
    """Return this rank, 0 without a group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """Return the number of ranks, 1 without a group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """Return this rank among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_group() -> Any:
    """Return the group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """Return the rank over all of a rank in `group`."""
    return dist.get_global_rank(group, group_rank) if group is not None else group_rank


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """Return the ranks of a group."""
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def inference_all_reduce(tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Any = None) -> Any:
    """Sum over the ranks, in place."""
    return dist.all_reduce(tensor, op=op, group=group)


def _ours_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("prof", "log_name", "debug")}


def _passing(name: str) -> Any:
    function = getattr(dist, name)

    def collective(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **_ours_out(kwargs))

    collective.__name__ = name
    collective.__doc__ = f"Do what torch.distributed.{name} does; DeepSpeed's own logging arguments are taken out."
    return collective


def reduce_scatter_fn(
    output_tensor: torch.Tensor, tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Any = None, **kwargs: Any
) -> Any:
    """Reduce and scatter one flat tensor."""
    return dist.reduce_scatter_tensor(output_tensor, tensor, op=op, group=group, **_ours_out(kwargs))


def allgather_fn(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
    """Gather into one flat tensor."""
    return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, **_ours_out(kwargs))


def configure(*args: Any, **kwargs: Any) -> None:
    """Do nothing: every collective is recorded without it (`distui monitor`, `distui status`)."""


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Print, on rank 0, how often this rank entered each collective, and with how many bytes.

    Straggling ranks are named by the dashboard and `distui status`, while the job runs.
    """
    from distui.compat.deepspeed.comm.summary import summary

    table = summary()
    if get_rank() == 0:
        for name, entry in table.items():
            print(f"{name}: {entry['count']} calls, {entry['bytes']:,} bytes")
        if not table:
            print("no collective is recorded: start the script with `distui launch`")
    return table if return_dict else None


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and hasattr(dist, name):
        found = getattr(dist, name)
        value = _passing(name) if callable(found) and not isinstance(found, type) else found
        globals()[name] = value
        return value
    raise AttributeError(f"distui's deepspeed.comm has no {name!r}; {PAGE} lists what is offered")
