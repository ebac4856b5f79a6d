"""Rows that travel between ranks, each to a rank of its own: an uneven all-to-all that autograd can go back through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks import ops
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.pool import BufferPool


class Exchange:
    """The way between the ranks that share experts. All of them must come to each call, forward and backward."""

    def __init__(self, group: dist.ProcessGroup, alike: dist.ProcessGroup | None = None) -> None:
        """Join the ranks of `group`; those of `alike` have the same tokens, as tensor-parallel ranks do."""
        self.alike = alike
        self.transport = Transport(group, "experts", BufferPool())
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.layers: dict[str, int] = {}
        """The layers that use it, numbered in their first order, which is that of all ranks."""
        self.before: Callable[[], None] = lambda: None
        """Called before each travel: a rank that waits for tokens serves nobody who waits for parameters (stage 3)."""

    def counts(self, own: torch.Tensor, layer: str, comes_back: bool) -> list[list[int]]:
        """Return the `own` counts [experts] of every rank, which `layer` sends tokens by. Collective; the host waits.

        Raises: UserError, on all ranks, where they came to different layers, or not all of them come back in a
        backward.
        """
        self.before()
        place = 2 * self.layers.setdefault(layer, len(self.layers)) + comes_back
        mine = torch.cat([own, own.new_tensor([place])]).to(ops.device_over(own.device, self.group))
        found = torch.empty(self.num_ranks * mine.numel(), dtype=mine.dtype, device=mine.device)
        self.transport.all_gather(found, mine).wait()
        rows: list[list[int]] = found.view(self.num_ranks, -1).tolist()
        if len({row[-1] for row in rows}) > 1:
            self._refuse_places([row[-1] for row in rows])
        return [row[:-1] for row in rows]

    def _refuse_places(self, places: list[int]) -> None:
        names = {number: name for name, number in self.layers.items()}
        ranks = dist.get_process_group_ranks(self.group)
        told = [
            f"rank {rank} at {names.get(place // 2, 'another layer')} {'with' if place % 2 else 'without'} gradients"
            for rank, place in zip(ranks, places, strict=True)
        ]
        raise UserError(
            "ranks that share experts came to different places of the model",
            f"{'; '.join(told)}: tokens travel among all of them at each layer, in forward and in backward",
            "run as many forwards on each rank, in training and in evaluation (prepared loaders give as many batches), "
            "with no layer left out on some; a rank with nothing to do runs the forward of any batch",
        )

    @torch.compiler.disable
    def send(self, tensors: Sequence[torch.Tensor], sizes_out: list[int], sizes_in: list[int], num_rows: int) -> Any:
        """Send the first `sizes_out[0]` rows of each tensor to rank 0, and so on; return what came, in rank order.

        Collective, in backward too, whatever requires a gradient here. `num_rows` are those that all ranks send.
        """
        # Where nothing on this rank requires a gradient, something on another may, which comes back through here.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        return _Travel.apply(self, sizes_out, sizes_in, num_rows, anchor, *tensors)

    def travel(
        self, tensors: Sequence[torch.Tensor], sizes_out: list[int], sizes_in: list[int], num_rows: int
    ) -> tuple[torch.Tensor, ...]:
        """Send rows of several tensors together, as bytes: backends know few formats."""
        self.before()
        rows, num_in = [_as_bytes(tensor) for tensor in tensors], sum(sizes_in)
        widths = [row.shape[1] for row in rows]
        device = ops.device_over(rows[0].device, self.group)
        sent = (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).to(device)
        came = torch.empty((num_in, sum(widths)), dtype=torch.uint8, device=device)
        self.transport.all_to_all_uneven(came, sent, sizes_in, sizes_out, num_rows * sum(widths)).wait()
        self.transport.sent_bytes += (sum(sizes_out) - sizes_out[self.rank]) * sum(widths)
        parts = came.to(rows[0].device).split(widths, 1) if len(rows) > 1 else [came.to(rows[0].device)]
        return tuple(
            part.contiguous().view(tensor.dtype).view(num_in, *tensor.shape[1:])
            for part, tensor in zip(parts, tensors, strict=True)
        )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(tensor.shape[0], math.prod(tensor.shape[1:])).view(torch.uint8)


class _Travel(torch.autograd.Function):
    """Rows there; their gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        exchange: Exchange,
        sizes_out: list[int],
        sizes_in: list[int],
        num_rows: int,
        anchor: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.sizes, ctx.num_rows = exchange, (sizes_out, sizes_in), num_rows
        return exchange.travel(tensors, sizes_out, sizes_in, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        sizes_out, sizes_in = ctx.sizes
        return None, None, None, None, None, *ctx.exchange.send(grads, sizes_in, sizes_out, ctx.num_rows)
