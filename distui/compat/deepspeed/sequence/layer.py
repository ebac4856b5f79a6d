"""`DistributedAttention`: Ulysses (arXiv 2309.14509) around a script's own attention, in a group of the script's.

Each rank has a piece of every sequence, and in attention all of it for a part of the heads. The engine knows nothing of
it: ranks are data-parallel, with a loss of their piece each, and the mean of their gradients is that of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.compat.not_offered import NotOffered
from distui.core.errors import UserError
from distui.core.ranks import ops


class _SeqAllToAll(torch.autograd.Function):
    """Cuts one dimension over the ranks, and joins another of theirs; backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, scatter: int, gather: int) -> torch.Tensor:
        ctx.given = group, scatter, gather
        ranks = dist.get_world_size(group)
        device = ops.device_over(x.device, group)
        sent = torch.stack(x.chunk(ranks, scatter)).to(device)
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=group)
        return torch.cat(list(found.to(x.device)), gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        group, scatter, gather = ctx.given
        return _SeqAllToAll.apply(grad, group, gather, scatter), None, None, None


class DistributedAttention(nn.Module):
    """Attention of a piece of each sequence: `local_attention` sees whole sequences of this rank's heads."""

    def __init__(
        self,
        local_attention: nn.Module,
        sequence_process_group: dist.ProcessGroup,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        """`scatter_idx` is the dimension of heads, `gather_idx` that of the sequence."""
        super().__init__()
        self.local_attn, self.spg = local_attention, sequence_process_group
        self.scatter_idx, self.gather_idx, self.num_kv_heads = scatter_idx, gather_idx, num_kv_heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return this rank's piece of the output. Collective: the group.

        Raises: UserError for heads that the ranks do not divide; NotOffered for rotary embeddings to be applied here.
        """
        if rotary_pos_emb is not None:
            raise NotOffered(
                "DistributedAttention(rotary_pos_emb=...) is not offered by distui",
                "their layout is Megatron-LM's",
                "apply them to query and key before, with the positions of the whole",
            )
        ranks = dist.get_world_size(self.spg)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if (heads := x.shape[self.scatter_idx]) % ranks:
                raise UserError(
                    f"{heads} heads of the {name} over {ranks} ranks",
                    "in attention each rank has the whole sequence of as many heads",
                    "take a group whose size divides the heads, or repeat those of key and value",
                )
        whole = [self._swapped(x, self.scatter_idx, self.gather_idx) for x in (query, key, value)]
        return self._swapped(self.local_attn(*whole, *args, **kwargs), self.gather_idx, self.scatter_idx)

    def _swapped(self, x: torch.Tensor, scatter: int, gather: int) -> torch.Tensor:
        found: torch.Tensor = _SeqAllToAll.apply(x, self.spg, scatter, gather)
        return found
