"""Trains a `ShardedModel` without an engine, as one does that knows what the engine does in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel

Trained = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Losses, norms before clipping, and the weights at the end."""


def train_by_hand(
    sharded: ShardedModel,
    optimizer: ShardedOptimizer,
    batches: Iterable[torch.Tensor],
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    *,
    accumulation: int,
    max_norm: float,
) -> Trained:
    """Take a step with each of the global `batches`, of which every rank has its part. Collective."""
    rank, num_ranks = sharded.placement.rank, sharded.placement.num_ranks
    losses, norms = [], []
    for batch in batches:
        size = len(batch) // (num_ranks * accumulation)
        total = torch.zeros(())
        for micro in range(accumulation):
            first = (micro * num_ranks + rank) * size
            sharded.schedule.sync = micro == accumulation - 1
            sharded.schedule.hide_gradients()
            loss = loss_of(sharded.model, batch[first : first + size]) / accumulation
            loss.backward()
            sharded.schedule.end_backward()
            total += loss.detach()
        norm = optimizer.grad_norm(None, 2.0).item()
        if norm > max_norm:
            optimizer.scale_gradients(max_norm / (norm + 1e-6), None)
        optimizer.step()
        optimizer.zero_grad()
        if num_ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item() / num_ranks)
        norms.append(norm)
    return losses, norms, sharded.full_state_dict()
