"""The same start on all ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.errors import UserError
from distui.core.ranks import ops
from distui.core.sharding.homes.homes import agreed

BUCKET_BYTES = 64 << 20
"""What one broadcast carries at most, where several tensors fit."""


def start_alike(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank of `group` the parameters and buffers of rank 0. Collective.

    Raises: UserError on all ranks where the models differ in names, shapes or formats.
    """
    check_alike(model, group)
    broadcast_alike([*model.parameters(), *model.buffers()], group)


def check_alike(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Refuse models that differ between the ranks. Collective.

    Raises: UserError on all ranks where they differ in names, shapes or formats.
    """
    rank = dist.get_rank(group)
    named = [*model.named_parameters(), *model.named_buffers()]
    mine = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    of_rank_0: list[Any] = [mine if rank == 0 else None]
    dist.broadcast_object_list(of_rank_0, group=group, group_src=0)

    def check() -> None:
        differing = next((pair for pair in zip(of_rank_0[0], mine, strict=False) if pair[0] != pair[1]), None)
        if differing is None and len(mine) == len(of_rank_0[0]):
            return
        why = f"rank 0 has {len(of_rank_0[0])} tensors, rank {rank} {len(mine)}"
        if differing is not None:
            why = f"rank 0 has {differing[0]}, rank {rank} {differing[1]}"
        raise UserError("the ranks hold different models", why, "build the same model on every rank")

    agreed(check, group)


def broadcast_alike(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Give every rank of `group` the numbers of rank 0, in place; memory that several share travels once. Collective.

    Small tensors of one format and device travel together, `BUCKET_BYTES` at a time.
    """
    buckets: defaultdict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    filled: Counter[tuple[torch.dtype, torch.device]] = Counter()
    seen = set()
    for tensor in (tensor.detach() for tensor in tensors):
        kind = (tensor.dtype, tensor.device)
        place = (*kind, tensor.data_ptr(), tensor.shape, tensor.stride())
        if not tensor.numel() or place in seen:
            continue
        seen.add(place)
        if buckets[kind] and filled[kind] + tensor.nbytes > BUCKET_BYTES:
            _broadcast(buckets.pop(kind), group)
            filled[kind] = 0
        buckets[kind].append(tensor)
        filled[kind] += tensor.nbytes
    for bucket in buckets.values():
        _broadcast(bucket, group)


def _broadcast(bucket: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    device = ops.device_over(bucket[0].device, group)
    if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].device == device:
        dist.broadcast(bucket[0], group=group, group_src=0)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(device)
    dist.broadcast(flat, group=group, group_src=0)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))
