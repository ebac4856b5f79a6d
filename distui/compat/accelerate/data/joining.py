"""Unequal numbers of batches: ranks that are done take part in the reductions of those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from distui.compat.accelerate.refusals import NotOffered
from distui.core.ranks import ops

if TYPE_CHECKING:
    from distui.compat.accelerate.ranks import Ranks


@contextmanager
def joining(accelerator: Ranks, models: list[nn.Module]) -> Iterator[None]:
    """Let ranks leave the block after different numbers of backward passes (stage 0). Collective.

    Before each training forward the ranks count who is still at work; one that has left the block adds zeros to every
    reduction until nobody is, and then takes the weights of the last. Optimizer states of ranks that left early stay
    behind, as with torch's `Join`.

    Raises: NotOffered for another stage or backend.
    """
    backend = accelerator.engine.backend
    stage = accelerator.engine.config.strategy.zero_stage
    if backend.name != "native" or stage > 0 or backend.axes is not None:
        raise NotOffered(
            "join_uneven_inputs(even_batches=False) is not offered by distui here",
            f"the strategy is {accelerator.engine.config.summary()}, and joining works on the native backend at stage "
            "0, each rank with batches of its own",
            "leave even_batches=True, or use drop_last",
        )
    models = list(models)

    def announce(module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            _count(at_work=True)

    handles = [models[0].register_forward_pre_hook(announce)] if models else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not models:
        return
    rank = accelerator.process_index
    last = rank
    while (working := _count(at_work=False)).any():
        last = int(torch.nonzero(working).max())
        for sharded in backend._models.values():  # type: ignore[attr-defined]
            sharded.schedule._open = True  # units that got no gradient take zeros
            sharded.schedule.end_backward()
            sharded.schedule.discard_gradients()
    last = int(ops.reduce(torch.tensor(last if last != rank else -1), "max"))
    source = last if last >= 0 else 0
    for model in models:
        for param in model.parameters():
            dist.broadcast(param.data, src=source)


def _count(at_work: bool) -> torch.Tensor:
    """Return which ranks are still at work. Collective."""
    working = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=ops.object_device())
    working[dist.get_rank()] = int(at_work)
    dist.all_reduce(working)
    return working.cpu()
