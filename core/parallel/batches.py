"""Whether ranks that compute one forward together were given the same batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks import ops

LOOKED_AT = 2
"""So many batches of the beginning are compared."""


class CutBatch(list[tuple[Any, dict[str, Any], dict[str, Any]]]):
    """A batch that is cut into micro-batches already, for a pipelined model: each (args, kwargs, keywords of the loss).

    Their losses count the same, whatever their rows. A stage that neither takes the input nor computes the loss may
    be given None for either.
    """


def compare_batch(batch: Any, group: dist.ProcessGroup, kind: str, *, is_there: bool = True) -> None:
    """Raise UserError on all ranks where they do not have the same batch, those aside that have none. Collective."""
    digest = hashlib.blake2b(digest_size=7)
    for path, tensor in ops.iter_tensors(batch):
        digest.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    own = int.from_bytes(digest.digest(), "big")
    nothing = -(2**62)
    ends = torch.tensor([own, -own] if is_there else [nothing, nothing], device=ops.object_device(group))
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if int(ends[0]) != -int(ends[1]) and int(ends[0]) != nothing:
        raise UserError(
            f"{kind} ranks were given different batches",
            f"{dist.get_world_size(group)} ranks compute one forward together, and what it was given differs",
            "prepare the loader (engine.prepare gives them the same samples), and draw nothing by a rank's own seed",
        )
