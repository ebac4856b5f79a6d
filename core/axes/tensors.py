"""Cuts tensors by a `Cut`, and puts them together again."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distui.core.axes.cut import Cut
from distui.core.ranks import ops


def take(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return a copy of what a rank holds of `whole`. Shapes: `cut.shape` gives `cut.local_shape`."""
    found = whole.view(cut.shape)
    for dim, pieces in enumerate(cut.pieces):
        if pieces != ((0, cut.shape[dim]),):
            parts = [found.narrow(dim, begin, length) for begin, length in pieces]
            found = torch.cat(parts, dim) if parts else found.narrow(dim, 0, 0)
    return found.clone(memory_format=torch.contiguous_format) if found.data_ptr() == whole.data_ptr() else found


def put(local: torch.Tensor, cut: Cut, whole: torch.Tensor) -> None:
    """Write what a rank holds to its place in `whole`, which is contiguous."""
    target, flat = whole.view(cut.shape), local.reshape(-1)
    for box in cut.boxes():
        place = target
        for dim, (begin, length) in enumerate(zip(box.start, box.size, strict=True)):
            place = place.narrow(dim, begin, length)
        place.copy_(flat.as_strided(box.size, box.strides, flat.storage_offset() + box.at))


def assemble(local: torch.Tensor, cut: Cut, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the whole tensor of which every rank of `group` holds what its own cut says. Collective: all of `group`.

    It travels as a sum of bytes with zeros, which is exact in every format; copies that are not the owner's count zero.
    """
    device = ops.device_over(local.device, group)
    content = torch.zeros(cut.numel * local.dtype.itemsize, dtype=torch.uint8, device=device)
    if cut.is_owner:
        put(local.detach().to(device), cut, content.view(local.dtype))
    dist.all_reduce(content, group=group)
    return content.view(local.dtype).view(cut.shape).to(local.device)
