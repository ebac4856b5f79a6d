"""torch's `DistributedDataParallel`: all states on every rank, gradients averaged in buckets during backward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distui.core.backends.forward import Body, Through, restore_forward
from distui.core.backends.plain import PlainBackend
from distui.core.errors import UserError
from distui.core.ranks.precision import DTYPES
from distui.core.sharding.transport.alike import start_alike

_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
"""Off: each rank keeps its own buffers, as on the other backends. torch 2.13 renamed the option."""


class DDPBackend(PlainBackend):
    """Runs the model's forward through DDP; under bf16 and fp16 by autocast over fp32 parameters."""

    name = "ddp"
    comm_hook: tuple[Any, Any] | None = None
    """What DDP's `register_comm_hook` takes (state, hook), in place of a plain average; set before a model comes."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Send the forward of `model` through DDP. Collective."""
        dtype = self.config.precision.dtype
        body = Body(model, None if dtype == "fp32" else DTYPES[dtype])
        wrapper: nn.Module = body
        if self.group is not None:
            start_alike(model, self.group)
            if any(param.requires_grad for param in model.parameters()):
                options: dict[str, Any] = {_SYNC_BUFFERS: False}
                wrapper = DistributedDataParallel(
                    body,
                    process_group=self.group,
                    init_sync=False,
                    **options,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=self.config.strategy.find_unused_parameters,
                )
                wrapper.register_comm_hook(*(self.comm_hook or (self.group, _average)))
        Through(model, wrapper)
        return super().prepare_model(model)

    def _wrapper(self, model: nn.Module) -> DistributedDataParallel | None:
        through = model.__dict__.get("forward")
        found = through.wrapper if isinstance(through, Through) else None
        return found if isinstance(found, DistributedDataParallel) else None

    def set_sync(self, sync: bool) -> None:
        """Let the coming backward send gradients, or keep them."""
        for model in self.models:
            if (wrapper := self._wrapper(model)) is not None:
                wrapper.require_backward_grad_sync = sync

    def backward(self, loss: torch.Tensor, factor: float, **kwargs: Any) -> None:
        """Compute gradients and average them over the ranks. Collective.

        Raises: UserError where parameters took no part, which DDP would only find out at the next forward.
        """
        super().backward(loss, factor, **kwargs)
        if not self.config.strategy.find_unused_parameters:
            for model in self.models:
                wrapper = self._wrapper(model)
                if wrapper is not None and wrapper.require_backward_grad_sync:
                    _refuse_unused(model)

    def free(self) -> None:
        """Give the models their own forward back."""
        for model in self.models:
            restore_forward(model)
        super().free()


def _average(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket. From Python, so that telemetry counts it: DDP's own reduction passes by torch.distributed."""
    buffer = bucket.buffer().div_(group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    assert work is not None
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


# DDP compares the annotations themselves, which `from __future__ import annotations` has made texts.
_average.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]})


def _refuse_unused(model: nn.Module) -> None:
    unused = [name for name, param in model.named_parameters() if param.requires_grad and param.grad is None]
    num_trainable = sum(param.requires_grad for param in model.parameters())
    if unused and len(unused) < num_trainable:
        raise UserError(
            f"{len(unused)} of {num_trainable} parameters took no part in the loss, such as {unused[0]}",
            "ddp then waits for gradients that never come, and the ranks would train apart",
            "set strategy.find_unused_parameters to true, freeze them, or set strategy.backend to native",
        )
