"""Causal attention over pieces of a sequence that stay where they are: keys and values go around in a ring.

Liu et al., arXiv 2310.01889; the pieces are laid out in a zigzag, so that all ranks have as much to do: of 2 P chunks
rank r has the chunks r and 2 P - 1 - r. While a rank attends to one rank's keys and values it hands them on to the
next. Softmax over all keys is put together of parts by their logarithms of sums (Dao, arXiv 2307.08691, section 3.1).
Scores are computed in float32, a tile of rows at a time, by plain matrix products on any device.

Shapes: B samples, H heads of queries, K heads of keys and values, G = H / K, T tokens of a rank in two chunks, D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from distui.core.ranks import ops

_TILE_NUMEL = 1 << 23
"""Scores that are computed at a time: 32 MiB of them."""
_NEVER = float("-inf")


def zigzag(length: int, num_ranks: int) -> torch.Tensor:
    """Return the positions of each rank's tokens, [num_ranks, length / num_ranks]; 2 num_ranks divide `length`."""
    chunks = torch.arange(length).view(2 * num_ranks, -1)
    return torch.cat([chunks[:num_ranks], chunks[num_ranks:].flip(0)], 1)


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Return causal attention [B, H, T, D] of this rank's queries [B, H, T, D] to all ranks' keys [B, K, T, D].

    `padding` [B, all tokens] says which tokens are none; a query that sees nothing gives 0. Collective: the group, in
    backward too.
    """
    found: torch.Tensor = _Ring.apply(query, key, value, padding, scale, group)
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        scale: float,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ring = _Blocks(group, query.shape[2], padding)
        q = _by_key_head(query, key.shape[1]) * scale
        output = q.new_zeros(*q.shape[:-1], value.shape[-1])
        sums = q.new_full(q.shape[:-1], _NEVER)
        """Logarithms of the sums of exponentials, over the keys so far."""
        kept, sizes = torch.cat([key, value], -1), (key.shape[-1], value.shape[-1])
        for step in range(ring.num_ranks):
            arriving = ring.hand_on(kept) if step < ring.num_ranks - 1 else None
            k, v = kept.float().split(sizes, -1)
            for rows, columns, scores in ring.scores(q, k, step):
                of_tile = torch.logsumexp(scores, -1)
                part = torch.exp(scores - of_tile[..., None].nan_to_num(neginf=0.0)) @ v[:, :, None, columns]
                before = sums[..., rows]
                both = torch.logaddexp(before, of_tile)
                output[..., rows, :] *= _share(before, both)
                output[..., rows, :] += part * _share(of_tile, both)
                sums[..., rows] = both
            if arriving is not None:
                kept = arriving()
        ctx.save_for_backward(query, key, value, output, sums, padding)
        ctx.scale, ctx.group = scale, group
        return output.flatten(1, 2).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, sums, padding = ctx.saved_tensors
        ring = _Blocks(ctx.group, query.shape[2], padding)
        q = _by_key_head(query, key.shape[1]) * ctx.scale
        grad = _by_key_head(grad, key.shape[1])
        inner = (grad * output).sum(-1)
        for_q = torch.zeros_like(q)
        kept, sizes = torch.cat([key, value], -1), (key.shape[-1], value.shape[-1])
        for_kept = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
        """Gradients of the keys and values that are here; they travel with them, and one rank further to their own."""
        for step in range(ring.num_ranks):
            arriving = ring.hand_on(kept) if step < ring.num_ranks - 1 else None
            k, v = kept.float().split(sizes, -1)
            for_k, for_v = for_kept.split(sizes, -1)
            for rows, columns, scores in ring.scores(q, k, step):
                weights = torch.exp(scores - sums[..., rows, None].nan_to_num(neginf=0.0))
                of_rows = grad[..., rows, :]
                for_scores = weights * (of_rows @ v[:, :, None, columns].mT - inner[..., rows, None])
                for_q[..., rows, :] += for_scores @ k[:, :, None, columns]
                for_k[:, :, columns] += (for_scores.mT @ q[..., rows, :]).sum(2)
                for_v[:, :, columns] += (weights.mT @ of_rows).sum(2)
            for_kept = ring.hand_on(for_kept)()
            if arriving is not None:
                kept = arriving()
        for_query = (for_q * ctx.scale).flatten(1, 2).to(query.dtype)
        for_key, for_value = for_kept.split(sizes, -1)
        return for_query, for_key.to(key.dtype), for_value.to(value.dtype), None, None, None


def _by_key_head(x: torch.Tensor, num: int) -> torch.Tensor:
    """[B, H, T, D] gives [B, K, G, T, D] in float32."""
    return x.float().unflatten(1, (num, -1))


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return what a part of a softmax counts for in the whole; nothing where neither has seen a key."""
    return torch.where(whole == _NEVER, 0.0, torch.exp(part - whole))[..., None]


class _Blocks:
    """Which of this rank's queries see which keys of whom, and the way around the ring."""

    def __init__(self, group: dist.ProcessGroup, length: int, padding: torch.Tensor | None) -> None:
        self.group, self.index, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._half, self._padding = length // 2, padding

    def hand_on(self, tensor: torch.Tensor) -> Any:
        """Send `tensor` to the next rank; the function that is returned waits for the one before's, and returns it."""
        sent = tensor.contiguous().to(ops.device_over(tensor.device, self.group))
        received = torch.empty_like(sent)
        behind, before = (self._ranks[(self.index + hop) % self.num_ranks] for hop in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, behind, self.group),
                dist.P2POp(dist.irecv, received, before, self.group),
            ]
        )

        def wait() -> torch.Tensor:
            for work in works:
                work.wait()
            return received.to(tensor.device)

        return wait

    def scores(self, q: torch.Tensor, k: torch.Tensor, step: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Give rows, columns and their scores [B, K, G, rows, columns], of the keys that came from `step` ranks before.

        What may not be seen is -inf; tiles of which nothing may are left out.
        """
        half, owner = self._half, (self.index - step) % self.num_ranks
        own, others = self._chunks(self.index), self._chunks(owner)
        tile = max(1, _TILE_NUMEL // max(1, q[..., 0, 0].numel() * half))
        for place, chunk in enumerate(own):
            for there, other in enumerate(others):
                if other > chunk:
                    continue
                columns = slice(there * half, (there + 1) * half)
                for low in range(place * half, (place + 1) * half, tile):
                    rows = slice(low, min(low + tile, (place + 1) * half))
                    found = q[..., rows, :] @ k[:, :, None, columns].mT
                    if other == chunk:
                        at = torch.arange(half, device=q.device)
                        later = at[None] > at[rows.start - place * half : rows.stop - place * half, None]
                        found.masked_fill_(later, _NEVER)
                    if self._padding is not None:
                        keys = self._padding[:, other * half : (other + 1) * half]
                        found.masked_fill_(keys[:, None, None, None], _NEVER)
                    yield rows, columns, found

    def _chunks(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.num_ranks - 1 - rank
