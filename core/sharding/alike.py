"""The same start on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.errors import UserError


def start_alike(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank of `group` the parameters and buffers of rank 0. Collective.

    Raises: UserError on all ranks where the models differ in names, shapes or formats.
    """
    rank = dist.get_rank(group)
    named = [*model.named_parameters(), *model.named_buffers()]
    mine = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    of_rank_0: list[Any] = [mine if rank == 0 else None]
    dist.broadcast_object_list(of_rank_0, group=group, group_src=0)
    differing = [pair for pair in zip(of_rank_0[0], mine, strict=False) if pair[0] != pair[1]]
    same = torch.tensor(int(not differing and len(mine) == len(of_rank_0[0])))
    dist.all_reduce(same, op=dist.ReduceOp.MIN, group=group)
    if not same.item():
        why = (
            f"rank 0 has {differing[0][0]}, rank {rank} {differing[0][1]}"
            if differing
            else (f"rank 0 has {len(of_rank_0[0])} tensors, rank {rank} {len(mine)}")
        )
        raise UserError("the ranks hold different models", why, "build the same model on every rank")
    for _, tensor in named:
        if tensor.numel():
            dist.broadcast(tensor.detach(), group=group, group_src=0)
