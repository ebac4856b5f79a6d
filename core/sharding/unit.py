"""A unit: parameters that are gathered, reduced and stepped together, and the flat buffers that hold them.

Buffers of a unit of P elements (padded) on one of N ranks, by what the stage shards:

    parameters  `full` [P] replicated, or `shard` [P/N] and a slot [P] while the unit runs       (stage 3)
    gradients   `grad_full` [P] replicated, or `grad_shard` [P/N] and a pooled [P] while it fills (stage 2, 3)
    optimizer   `master` [P] or [P/N] (stage 1 to 3): what the optimizer steps; the same memory as the parameters
                where these are fp32, else an fp32 copy

`param.data` is a view set once. `param.grad` is None during backward: autograd hands its fresh gradient over, and one
pass scales it and writes or adds it to the flat gradient, so nothing is ever zeroed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from distui.core.sharding.layout import FlatLayout, plan_layout
from distui.core.sharding.pool import BufferPool
from distui.core.sharding.transport import Pending, Transport

_SMALL_NUMEL = 1 << 12
"""Gradients up to this size are written together: for one alone the call costs more than the copy."""


class GradState(Enum):
    """Where a unit's gradients are in the current backward."""

    FILLING = "filling"
    READY = "ready"
    REDUCING = "reducing"
    REDUCED = "reduced"


@dataclass(frozen=True, slots=True)
class Placement:
    """What of a model's states is sharded, over how many ranks, and in which formats."""

    stage: int
    rank: int
    num_ranks: int
    compute_dtype: torch.dtype | None
    """Format of the parameters; None leaves each as it is."""
    reduce_in_fp32: bool

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1 and self.num_ranks > 1

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2 and self.num_ranks > 1

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3 and self.num_ranks > 1


class Unit:
    """One flat group of parameters of one dtype, all trainable or all frozen."""

    def __init__(
        self,
        name: str,
        named_params: list[tuple[str, nn.Parameter]],
        modules: list[nn.Module],
        is_root: bool,
        placement: Placement,
        pool: BufferPool,
        transport: Transport | None,
        gathers: Transport | None,
    ) -> None:
        self.name, self.modules, self.is_root = name, modules, is_root
        self.placement, self.pool = placement, pool
        self.transport, self.gathers = transport, gathers
        self.param_names = [param_name for param_name, _ in named_params]
        self.params = [param for _, param in named_params]
        first = self.params[0]
        self.trainable = first.requires_grad
        self.dtype = placement.compute_dtype or first.dtype
        self.device = first.device
        low_precision = self.dtype.itemsize < 4
        self.grad_dtype = torch.float32 if low_precision and placement.reduce_in_fp32 else self.dtype
        num_shards = placement.num_ranks if placement.shards_optimizer else 1
        self.layout: FlatLayout = plan_layout([(n, p.shape) for n, p in named_params], num_shards)
        self.rank = placement.rank if num_shards > 1 else 0
        self._gaps = self.layout.gaps
        self.inverse_ranks = 1.0 / placement.num_ranks

        full = self._flatten(low_precision)
        start, end = self.layout.shard(self.rank)
        self.full: torch.Tensor | None = None
        if placement.shards_parameters:
            self.shard = full[start:end].clone()
        else:
            self.full = full
            self.shard = full[start:end]
            self.bind(full)
        if not (low_precision and self.trainable):
            self.master = self.shard

        # Gradients.
        self.state = GradState.FILLING
        self.pending: Pending | None = None
        self.sends_gradient = True
        """False (stage 0) where the optimizer exchanges something else in its step: the gradient then stays local."""
        self.grad_full: torch.Tensor | None = None
        self.grad_shard: torch.Tensor | None = None
        self.holds_gradient = False
        """The reduced (stage 0, 1: or local) gradient of an earlier backward is in the buffer: add to it."""
        self.arrived = [False] * len(self.params)
        self.num_arrived = 0
        self.shard_holds_gradient = False
        self._forgotten: set[int] = set()
        """Parameters whose gradient one of several optimizers forgot, since the last backward."""
        self._small: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Small gradients that arrived and are not written yet, each with its place."""
        self._views: dict[int, list[torch.Tensor]] = {}
        self.shard_is_current = False
        """The step wrote the parameters beside their fp32 master: publishing them needs no conversion."""
        if self.trainable:
            self._allocate_gradients()

        # Parameters in flight: the all-gather after a step (stage 1, 2) or before the unit runs (stage 3).
        self.gathering: Pending | None = None

    def _flatten(self, low_precision: bool) -> torch.Tensor:
        full = torch.zeros(self.layout.padded_numel, dtype=self.dtype, device=self.device)
        for param, span in zip(self.params, self.layout.spans, strict=True):
            full[span.offset : span.end].copy_(param.detach().reshape(-1))
        if low_precision and self.trainable:
            # The master keeps the precision that the script's own weights had.
            start, end = self.layout.shard(self.rank)
            self.master = torch.zeros(end - start, dtype=torch.float32, device=self.device)
            for index, (param, span) in enumerate(zip(self.params, self.layout.spans, strict=True)):
                low, high = self.layout.owned(index, self.rank)
                if low < high:
                    at = span.offset + low - start
                    self.master[at : at + high - low].copy_(param.detach().reshape(-1)[low:high])
        return full

    def bind(self, full: torch.Tensor) -> None:
        """Make every parameter a view of `full`; done once, so saved tensors stay right."""
        self.full = full
        for param, span in zip(self.params, self.layout.spans, strict=True):
            param.data = full[span.offset : span.end].view(span.shape)

    def _allocate_gradients(self) -> None:
        placement = self.placement
        if placement.shards_gradients:
            self.grad_shard = torch.zeros(self.layout.shard_numel, dtype=self.grad_dtype, device=self.device)
            return
        self.grad_full = torch.zeros(self.layout.padded_numel, dtype=self.grad_dtype, device=self.device)
        start, end = self.layout.shard(self.rank)
        self.grad_shard = self.grad_full[start:end]

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's view of the flat `buffer`; cached, since buffers are few and reused."""
        views = self._views.get(buffer.data_ptr())
        if views is None:
            views = [buffer[span.offset : span.end].view(span.shape) for span in self.layout.spans]
            self._views[buffer.data_ptr()] = views
        return views

    # ---- backward ------------------------------------------------------------------------------------------------

    def accept(self, index: int, grad: torch.Tensor) -> bool:
        """Take the gradient of parameter `index`; return True when it was the last one missing."""
        if self.state is not GradState.FILLING:
            self.finish_reduce()
            self.reopen()
        buffer = self.grad_full
        if buffer is None:
            buffer = self.grad_full = self._take_gradient()
        view = self.views(buffer)[index]
        if grad.is_sparse:
            grad = grad.to_dense()
        again = self.arrived[index]
        if again or self.holds_gradient:
            if again:
                self._write_small()
            view.add_(grad, alpha=self.inverse_ranks)
        elif grad.numel() <= _SMALL_NUMEL:
            self._small.append((view, grad))
        elif self.inverse_ranks == 1.0:
            view.copy_(grad)
        else:
            torch.mul(grad, self.inverse_ranks, out=view)
        if not again:
            self.arrived[index] = True
            self.num_arrived += 1
        if self.num_arrived == len(self.params):
            self._write_small()
            return True
        return False

    def _write_small(self) -> None:
        if self._small:
            views, grads = zip(*self._small, strict=True)
            self._small.clear()
            torch._foreach_copy_(views, grads)
            if self.inverse_ranks != 1.0:
                torch._foreach_mul_(views, self.inverse_ranks)

    def _take_gradient(self) -> torch.Tensor:
        return self.pool.take(self.layout.padded_numel, self.grad_dtype, self.device, self._gaps)

    def reopen(self) -> None:
        """Take gradients again after a reduction: a second backward before the step, or a second reentrant checkpoint.

        What was reduced is kept so that the next sum over the ranks gives it back.
        """
        if self.state is not GradState.REDUCED:
            return
        self.state = GradState.FILLING
        local = self.placement.num_ranks == 1 or not self.sends_gradient
        if local or self.placement.shards_gradients or self.grad_full is None:
            return
        if self.placement.shards_optimizer:
            start, end = self.layout.shard(self.rank)
            self.grad_full[:start].zero_()
            self.grad_full[end:].zero_()
        else:
            self.grad_full.mul_(self.inverse_ranks)

    def fill_missing(self) -> None:
        """Count gradients that did not come as zero (parameters that the loss does not depend on)."""
        if self.grad_full is None:
            self.grad_full = self._take_gradient()
        self._write_small()
        if not self.holds_gradient:
            views = self.views(self.grad_full)
            for index, arrived in enumerate(self.arrived):
                if not arrived:
                    views[index].zero_()

    def next_micro_batch(self) -> None:
        """Keep what arrived as a local sum and expect the gradients of another micro-batch (stage 0, 1)."""
        if self.num_arrived:
            self.fill_missing()
            self.holds_gradient = True
            self._forgotten.clear()
            self._forget_arrivals()

    def _forget_arrivals(self) -> None:
        self._small.clear()
        if self.num_arrived:
            self.arrived = [False] * len(self.params)
            self.num_arrived = 0

    def reduce(self) -> None:
        """Start summing the gradient over the ranks. Collective: all ranks, in the schedule's order."""
        assert self.grad_full is not None and self.grad_shard is not None
        self._forgotten.clear()
        if self.transport is None or not self.sends_gradient:
            self.state = GradState.REDUCED
            return
        self.state = GradState.REDUCING
        if self.placement.shards_gradients:
            self.pending = self.transport.reduce_scatter(
                self.grad_full, self.grad_shard, accumulate=self.shard_holds_gradient
            )
            self.shard_holds_gradient = True
        elif self.placement.shards_optimizer:
            self.pending = self.transport.reduce_scatter(self.grad_full, self.grad_shard)
        else:
            self.pending = self.transport.sum_gradient(self.grad_full)

    def _wait_for_sum(self) -> None:
        if self.pending is None:
            return
        self.pending.wait()
        self.pending = None
        assert self.transport is not None and self.grad_shard is not None
        if self.transport.shares_scales:
            # One NaN makes its whole block NaN, and padding must stay zero.
            start, end = self.layout.shard(self.rank)
            for low, high in self._gaps:
                self.grad_shard[min(max(low, start), end) - start : min(max(high, start), end) - start].zero_()

    def finish_reduce(self) -> None:
        """Wait for the sum; the pooled gradient buffer goes back."""
        self._wait_for_sum()
        if self.state is GradState.REDUCING:
            self.state = GradState.REDUCED
        if self.state is GradState.REDUCED:
            self._forget_arrivals()
            if self.placement.shards_gradients:
                if self.grad_full is not None:
                    self.pool.give(self.grad_full, self._gaps)
                    self.grad_full = None
                self.state = GradState.FILLING
            else:
                self.holds_gradient = True

    def discard_gradient(self) -> None:
        """Forget all gradients; what is in flight is waited for first, since peers count on it."""
        self._wait_for_sum()
        if self.placement.shards_gradients and self.grad_full is not None:
            self.pool.give(self.grad_full, self._gaps)
            self.grad_full = None
        self._forget_arrivals()
        self.holds_gradient = False
        self.shard_holds_gradient = False
        self._forgotten.clear()
        self.state = GradState.FILLING

    def forget(self, indices: set[int]) -> None:
        """Forget the gradients of some parameters; the others' stay until their own optimizer forgets them."""
        self.finish_reduce()
        self._forgotten |= indices
        if len(self._forgotten) == len(self.params):
            self.discard_gradient()
        elif self.grad_shard is not None:
            for start, end in self.layout.runs(indices, self.rank):
                self.grad_shard[start:end].zero_()

    @property
    def has_gradient(self) -> bool:
        """Whether `grad_shard` holds a sum over the ranks; the same on all ranks."""
        return self.shard_holds_gradient if self.placement.shards_gradients else self.holds_gradient

    # ---- parameters ----------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Bring weights that the optimizer stepped into the compute format and, in stage 1 and 2, to all ranks.

        Collective: all ranks. The gather is waited for by `finish_gather`.
        """
        if self.master is not self.shard and not self.shard_is_current:
            self.shard.copy_(self.master)
        self.shard_is_current = False
        if self.placement.shards_optimizer and not self.placement.shards_parameters and self.gathers is not None:
            assert self.full is not None
            self.gathering = self.gathers.all_gather(self.full, self.shard)

    def refresh_master(self) -> None:
        """Take the parameters, which somebody wrote, into the optimizer's copy."""
        if self.master is not self.shard:
            self.master.copy_(self.shard)

    def finish_gather(self) -> None:
        """Wait until the parameters are all here."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None
