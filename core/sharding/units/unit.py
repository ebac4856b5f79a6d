"""A unit: parameters that are gathered, reduced and stepped together, and the flat buffers that hold them.

Buffers of a unit of P elements (padded) on one of N ranks, by what the stage shards:

    parameters  `full` [P] replicated, or `shard` [P/N] and a slot [P] while the unit runs       (stage 3)
    gradients   `grad_full` [P] replicated, or `grad_shard` [P/N] and a pooled [P] while it fills (stage 2, 3)
    optimizer   `master` [P] or [P/N] (stage 1 to 3): what the optimizer steps; the same memory as the parameters
                where these are fp32, else an fp32 copy

`param.data` is a view while the unit is whole (`guarded` says what it is else). `param.grad` is None during backward:
autograd hands its fresh gradient over, and one pass scales it and writes or adds it to the flat gradient, so nothing is
ever zeroed first.

What has another home than the device (`core/offload`) rests in a cell instead: then `shard`, `master` or `grad_shard`
is not there, and `read_*`, `write_*` and `gradient` reach it wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distui.core.ranks import streams
from distui.core.sharding.homes.home import Cell, Transfer, Waitable
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.start.start import Start
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units.copies import Copies
from distui.core.sharding.units.guarded import GRAD
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.pool import BufferPool
from distui.core.sharding.units.seen_gradients import SeenGradients
from distui.core.sharding.units.states import GRAD_MOVES, GradState, Machine
from distui.core.sharding.units.unit_parameters import UnitParameters
from distui.kernels.l2_norm import norm_reference

_SMALL_NUMEL = 1 << 12
"""Gradients up to this size are written together: for one alone the call costs more than the copy."""
_COLLECTED_NUMEL = 1 << 17
"""Parameters up to this size need no hook: their gradients wait until the unit is complete, 512 KiB each at most."""


class Unit(SeenGradients, UnitParameters, Copies):
    """One flat group of parameters of one dtype, all trainable or all frozen when it was made.

    What a script freezes later has no gradient from then on; what it unfreezes makes its unit trainable (`train`).
    """

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
        homes: Homes | None,
        start: Start,
    ) -> None:
        super().__init__(name, named_params, modules, is_root, placement, gathers, homes, start)
        self.pool, self.transport = pool, transport
        low_precision = self.dtype.itemsize < 4
        self.grad_dtype = torch.float32 if low_precision and placement.reduce_in_fp32 else self.dtype
        self._gaps = self.layout.gaps
        self.share = self.inverse_ranks = 1.0 / placement.num_averaged
        """`share` is what an arriving gradient is multiplied by, so that the ranks' sum is what is stepped."""

        # Gradients.
        self.gradients = Machine(name, GradState.FILLING, GRAD_MOVES)
        self.pending: Waitable | None = None
        self.sends_gradient = True
        """False (stage 0) where the optimizer exchanges something else in its step: the gradient then stays local."""
        self.grad_full: torch.Tensor | None = None
        self.grad_shard: torch.Tensor | None = None
        self.grad_cell: Cell | None = None
        self.stored_norm: torch.Tensor | None = None
        """2-norm of the gradient in `grad_cell`, taken on its way there; None where it is not known."""
        self._reduced: torch.Tensor | None = None
        """Where the sum arrives that goes to `grad_cell`."""
        self.holds_gradient = False
        """The reduced (stage 0, 1: or local) gradient of an earlier backward is in the buffer: add to it."""
        self.arrived = [False] * len(self.params)
        self.num_arrived = 0
        self.num_expected = len(self.params)
        """Gradients that a whole backward brings: parameters that are frozen just now have none."""
        self._wanted = bytes(len(self.params))
        self.was_sent = False
        """The gradient has been reduced in this backward."""
        self.present = bytearray(len(self.params))
        """1 where a parameter has a gradient since the last step: on this rank, and once reduced, on any."""
        self.zeroed = bytearray(len(self.params))
        """1 where a gradient that does not come is zero: `zero_grad(set_to_none=False)` left it."""
        self.shard_holds_gradient = False
        self._forgotten: set[int] = set()
        """Parameters whose gradient one of several optimizers forgot, since the last backward."""
        self._small: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Small gradients that arrived and are not written yet, each with its place."""
        self._together_numel = _SMALL_NUMEL if self.device.type == "cpu" else _COLLECTED_NUMEL
        self.collected: tuple[int, ...] = ()
        """Parameters without a hook, taken from `param.grad` once all others have arrived."""
        self.came_last: int | None = None
        """The parameter whose gradient completed the last backward that gave all; its hook is kept."""
        self.show_gradient: Callable[..., torch.Tensor | None] | None = None
        """Stage 0: brings a reduced gradient into `param.grad`; None where no rank has the whole of it."""
        if self.trainable:
            self._allocate_gradients()

    def _allocate_gradients(self) -> None:
        placement = self.placement
        if placement.shards_gradients:
            if self.homes is not None and self.homes.gradients is not None:
                self.grad_cell = self.homes.gradients.cell(self.layout.shard_numel, self.grad_dtype)
                return
            self.grad_shard = torch.zeros(self.layout.shard_numel, dtype=self.grad_dtype, device=self.device)
            return
        self.grad_full = torch.zeros(self.layout.padded_numel, dtype=self.grad_dtype, device=self.device)
        start, end = self.layout.shard(self.rank)
        self.grad_shard = self.grad_full[start:end]

    def train(self) -> None:
        """Make room for the gradients and masters of parameters that were frozen when the unit was made."""
        self.trainable = True
        self.has_master = self.dtype.itemsize < 4
        if self.has_master:
            self._keep_master(self.read_shard().float())
        self._allocate_gradients()

    def expect(self) -> bool:
        """Count the gradients that the coming backward brings; return whether they are of other parameters now."""
        with torch._C.DisableTorchFunctionSubclass():
            wanted = bytes(param.requires_grad for param in self.params)
        changed, self._wanted = wanted != self._wanted, wanted
        self.num_expected = sum(wanted)
        return changed

    # ---- backward ------------------------------------------------------------------------------------------------

    def accept(self, index: int, grad: torch.Tensor) -> bool:
        """Take the gradient of parameter `index`; return True when it was the last one missing."""
        self._write(index, grad)
        if self.collected and self.num_arrived >= self.num_expected - len(self.collected):
            self.collect()
        if self.is_complete:
            self.fill_missing() if self.num_expected < len(self.params) else self._write_small()
            self.came_last = index
        return self.is_complete

    @property
    def is_complete(self) -> bool:
        """Whether every parameter's gradient has arrived."""
        return self.num_arrived >= self.num_expected

    @property
    def is_filled_again(self) -> bool:
        """Whether gradients have arrived since the reduction of this backward."""
        filling = self.gradients.state in (GradState.FILLING, GradState.READY)
        return filling and self.num_arrived > 0

    def collect(self) -> bool:
        """Take the gradients that wait in `param.grad`; return whether there were any."""
        any_found = False
        with torch._C.DisableTorchFunctionSubclass():
            for index in self.collected:
                param = self.params[index]
                grad = GRAD.__get__(param)
                if grad is not None:
                    GRAD.__set__(param, None)
                    self._write(index, grad)
                    any_found = True
        return any_found

    def choose_collected(self) -> None:
        """Leave hooks to the parameter that came last and to large ones, which are best written while in the cache."""
        self.collected = tuple(
            index
            for index, param in enumerate(self.params)
            if index != self.came_last and param.numel() <= _COLLECTED_NUMEL
        )

    def _write(self, index: int, grad: torch.Tensor) -> None:
        if self.gradients.state in (GradState.REDUCING, GradState.REDUCED):
            self.finish_reduce()
            self.reopen()
        self.gradients.do("write")
        buffer = self.grad_full
        if buffer is None:
            buffer = self.grad_full = self._take_gradient()
        view = self.views(buffer)[index]
        if grad.is_sparse:
            grad = grad.to_dense()
        if grad.requires_grad:  # of `create_graph`; what is summed and stepped has no graph
            grad = grad.detach()
        again = self.arrived[index]
        if again or self.holds_gradient:
            if again:
                self._write_small()
            view.add_(grad, alpha=self.share)
        elif grad.numel() <= self._together_numel:
            self._small.append((view, grad))
        elif self.share == 1.0:
            view.copy_(grad)
        else:
            torch.mul(grad, self.share, out=view)
        if not again:
            self.arrived[index] = True
            self.num_arrived += 1
        self.present[index] = 1

    def _write_small(self) -> None:
        if self._small:
            views, grads = zip(*self._small, strict=True)
            self._small.clear()
            torch._foreach_copy_(views, grads)
            if self.share != 1.0:
                torch._foreach_mul_(views, self.share)

    def keep_small(self) -> None:
        """Have gradients that wait live until the current stream, which did not make them, has read them."""
        for _, grad in self._small:
            streams.machine.keep(grad)

    def _take_gradient(self) -> torch.Tensor:
        return self.pool.take(self.layout.padded_numel, self.grad_dtype, self.device, self._gaps)

    def reopen(self) -> None:
        """Take gradients again after a reduction: a second backward before the step, or a second reentrant checkpoint.

        What was reduced is kept so that the next sum over the ranks gives it back.
        """
        if self.gradients.state is not GradState.REDUCED:
            return
        self.gradients.do("reopen")
        local = self.placement.num_ranks == 1 or not self.sends_gradient
        if local or self.placement.shards_gradients or self.grad_full is None:
            return
        if self.placement.shards_optimizer:
            start, end = self.layout.shard(self.rank)
            self.grad_full[:start].zero_()
            self.grad_full[end:].zero_()
            if self.replicas is not None:
                self.grad_full[start:end].mul_(1.0 / self.replicas.num)
        else:
            self.grad_full.mul_(1.0 / self.placement.num_ranks)

    def fill_missing(self) -> None:
        """Count gradients that did not come as zero (parameters that the loss does not depend on)."""
        self.collect()
        if self.grad_full is None:
            self.grad_full = self._take_gradient()
        self._write_small()
        if not self.holds_gradient:
            views = self.views(self.grad_full)
            for index, arrived in enumerate(self.arrived):
                if not arrived:
                    views[index].zero_()

    def complete(self) -> None:
        """Expect no more gradients of this backward; what did not come is zero on this rank."""
        self.fill_missing()
        self.gradients.do("complete")

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

    def reduce(self, last: bool = True) -> None:
        """Start summing the gradient over the ranks, with the `last` backward of a step over copies too.

        Collective: all ranks, in the schedule's order.
        """
        assert self.grad_full is not None
        self.was_sent = True
        self._forgotten.clear()
        if self.transport is None or not self.sends_gradient:
            self.gradients.do("keep")
            if self.placement.shards_gradients:
                self._keep_local(self.grad_full)
            return
        self.gradients.do("send")
        if not self.placement.shards_optimizer:
            self.pending = self.transport.sum_gradient(self.grad_full)
            return
        accumulate = self.placement.shards_gradients and self.shard_holds_gradient
        into = self.grad_shard
        if self.grad_cell is not None:
            assert self.homes is not None
            into = self._reduced = self.homes.take(self.grad_cell.numel, self.grad_dtype)
            if accumulate:
                self.grad_cell.fetch(into).wait()
        assert into is not None
        self.pending = self._sum_into(into, self.grad_full, accumulate, last)
        self.shard_holds_gradient = self.placement.shards_gradients

    def _keep_local(self, gradient: torch.Tensor) -> None:
        """One rank alone: bring the gradient to its home, added to what is there."""
        if self.grad_cell is not None:
            if self.shard_holds_gradient:
                with self.gradient() as before:
                    gradient.add_(before)
            self.pending = self._store_gradient(gradient)
        else:
            assert self.grad_shard is not None
            self.grad_shard.add_(gradient) if self.shard_holds_gradient else self.grad_shard.copy_(gradient)
        self.shard_holds_gradient = True

    def _store_gradient(self, gradient: torch.Tensor) -> Transfer:
        assert self.grad_cell is not None
        self.stored_norm = norm_reference(gradient, 2.0)
        return self.grad_cell.store(gradient)

    @contextmanager
    def gradient(self, writes: bool = False) -> Iterator[torch.Tensor]:
        """Give this rank's shard of the reduced gradient, from wherever it is; with `writes` changes are kept."""
        if self.grad_cell is None:
            assert self.grad_shard is not None
            yield self.grad_shard
            return
        assert self.homes is not None
        buffer = self.homes.take(self.grad_cell.numel, self.grad_dtype)
        self.grad_cell.fetch(buffer).wait()
        yield buffer
        if writes:
            self._store_gradient(buffer).wait()
        self.homes.give(buffer)

    def _wait_for_sum(self) -> None:
        if self.pending is None:
            return
        self.pending.wait()
        self.pending = None
        summed = self.grad_shard if self._reduced is None else self._reduced
        if summed is not None and self.transport is not None and self.transport.shares_scales:
            # One NaN makes its whole block NaN, and padding must stay zero.
            start, end = self.layout.shard(self.rank)
            for low, high in self._gaps:
                summed[min(max(low, start), end) - start : min(max(high, start), end) - start].zero_()

    def finish_reduce(self, only_done: bool = False) -> None:
        """Wait for the sum, or with `only_done` take it where it is here; the pooled gradient buffer goes back."""
        if only_done and not (isinstance(self.pending, Pending) and self.pending.is_done):
            return
        self._wait_for_sum()
        if self._reduced is not None:
            assert self.homes is not None
            reduced, self._reduced = self._reduced, None
            self.homes.give_after(self._store_gradient(reduced), reduced)
        if self.gradients.state is GradState.REDUCING:
            self.gradients.do("arrive")
        if self.gradients.state is GradState.REDUCED:
            self._forget_arrivals()
            if self.placement.shards_gradients:
                if self.grad_full is not None:
                    self.pool.give(self.grad_full, self._gaps)
                    self.grad_full = None
                self.gradients.do("reopen")
            else:
                self.holds_gradient = True

    def discard_gradient(self) -> None:
        """Forget all gradients; what is in flight is waited for first, since peers count on it."""
        self._wait_for_sum()
        if self._reduced is not None:
            assert self.homes is not None
            self.homes.give(self._reduced)
            self._reduced = None
        if self.placement.shards_gradients and self.grad_full is not None:
            self.pool.give(self.grad_full, self._gaps)
            self.grad_full = None
        self._forget_arrivals()
        for index in self.collected:
            GRAD.__set__(self.params[index], None)
        self.present = bytearray(len(self.params))
        self.holds_gradient = False
        self.shard_holds_gradient = self.is_summed = False
        self._forgotten.clear()
        self.was_sent = False
        self.gradients.do("discard")

    @property
    def has_gradient(self) -> bool:
        """Whether `grad_shard` holds a sum over the ranks; the same on all ranks."""
        return self.shard_holds_gradient if self.placement.shards_gradients else self.holds_gradient
