"""The collectives of the engine, as one seam: NCCL takes the tensor forms, gloo the fastest form measured for it.

Gloo's own reduce_scatter is an all-reduce inside and its all_gather copies through lists, so on gloo both are direct
exchanges of views between peers, and ranks of one host read each other's memory (`peer_memory`). Everything runs in
place on flat buffers and is asynchronous: a call returns a `Pending`, whose `wait` must be called once on every rank,
in the same order everywhere.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distui.core.sharding.transport.peer_memory import PeerMemory, Reading
from distui.core.sharding.transport.profiling import hidden_from_profiler, shown_in_profile
from distui.core.sharding.transport.underway import Underway
from distui.core.sharding.units.pool import BufferPool
from distui.core.telemetry.collectives import group_label, one_collective, see_end
from distui.core.telemetry.source import NullSource, current

_TAG_REDUCE_SCATTER = 7_001
_TAG_ALL_GATHER = 7_002
_TAG_ALL_TO_ALL = 7_003

ByRank = Mapping[int, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor
"""A tensor for each group rank."""


class Work(Protocol):
    """What torch.distributed returns for a collective in flight."""

    def wait(self) -> Any:
        """Wait until done: on CUDA the current stream waits, on the CPU the calling thread."""

    def is_completed(self) -> bool:
        """Tell whether a wait would end at once."""


class Pending:
    """A collective in flight; `wait` finishes it once and is free afterwards."""

    __slots__ = ("__weakref__", "_finish", "_held", "_token", "_transport", "_works")

    def __init__(
        self,
        transport: Transport,
        works: list[Work],
        token: int,
        finish: Callable[[], None] | None,
        tensors: Any = None,
    ) -> None:
        """`tensors` are what `works` read and write, where nothing but this keeps them."""
        self._transport, self._works, self._token, self._finish = transport, works, token, finish
        self._held = transport.underway.hold(self, works, tensors)
        if token and len(works) == 1 and not isinstance(works[0], Reading):
            see_end(transport.telemetry, works[0], token)

    @property
    def is_done(self) -> bool:
        """Whether a wait would end at once, as far as is known."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Block until the result is in its buffer, and account the time as exposed communication."""
        works = self._works
        if not works:
            return
        self._works = []
        transport = self._transport
        telemetry = transport.telemetry
        telemetry.waiting(self._token)
        start = time.perf_counter()
        with shown_in_profile(f"distui: wait for {transport.name}"):
            try:
                for work in works:
                    work.wait()
            finally:
                transport.underway.let_go(self._held)
            if self._finish is not None:
                self._finish()
                self._finish = None
        seconds = time.perf_counter() - start
        transport.exposed_s += seconds
        telemetry.waiting(None)
        telemetry.collective_waited(self._token, seconds)


class Transport:
    """Collectives over one process group, counted in the telemetry ledger under `name`."""

    min_read_bytes = 1 << 17
    """From this size on CPU ranks of one host read each other's memory; for less the messages cost more than a copy."""

    def __init__(self, group: dist.ProcessGroup, name: str, pool: BufferPool) -> None:
        self.group, self._pool = group, pool
        self.underway = Underway.of(group)
        self.underway.finish_dropped()
        self.name = group_label(group, name)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.exposed_s = 0.0
        """Seconds that the training thread was blocked here; the engine reads and resets it each step."""
        self.sent_bytes = 0
        """Bytes that this rank has sent since the start; of an all-reduce, what a ring sends."""
        self.shares_scales = False
        """Whether gradients travel in blocks, of which one value can spoil its neighbours."""
        self.hops: tuple[Transport, ...] = ()
        """Transports that this one sends through; what they send and wait for counts beside its own."""
        self.telemetry = current() or NullSource()
        self.peers = [(self.rank + hop) % self.world_size for hop in range(1, self.world_size)]

    def _begin(self, op: str, tensor: torch.Tensor) -> int:
        dtype = str(tensor.dtype).removeprefix("torch.")
        nbytes = tensor.numel() * tensor.element_size()
        return self.telemetry.collective_begin(self.name, op, dtype, nbytes, self.world_size)

    def _is_gloo(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _peer_memory(self, nbytes: int) -> PeerMemory | None:
        """Return the peers' memory for a CPU collective that takes `nbytes` from each. Collective, the first time."""
        return PeerMemory.of(self.group) if nbytes >= self.min_read_bytes else None

    def _end_of(self, token: int) -> Callable[[], None] | None:
        """Return what notes the end of a collective that another thread carries out."""
        if not token:
            return None
        self.telemetry.collective_seen(token)
        return functools.partial(self.telemetry.collective_end, token)

    def _exchange(self, received: ByRank, sent: ByRank, tag: int) -> list[Work]:
        """Give each peer its tensor of `sent` and get its tensor into `received`, straight over gloo's connections."""
        with hidden_from_profiler():
            works = [self.group.recv([received[peer]], peer, tag) for peer in self.peers]
            return [*works, *(self.group.send([sent[peer]], peer, tag) for peer in self.peers)]

    @one_collective
    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """Sum `tensor` over the group, in place. Collective: all ranks of the group."""
        token = self._begin("all_reduce", tensor)
        self.sent_bytes += 2 * tensor.nbytes * (self.world_size - 1) // self.world_size
        work = dist.all_reduce(tensor, op=op, group=self.group, async_op=True)
        return Pending(self, [work], token, None)

    @one_collective
    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """Send `tensor` of group rank `source` to all, in place. Collective: all ranks of the group."""
        token = self._begin("broadcast", tensor)
        work = dist.broadcast(tensor, group=self.group, async_op=True, group_src=source)
        return Pending(self, [work], token, None)

    @one_collective
    def all_to_all_uneven(
        self, received: torch.Tensor, sent: torch.Tensor, sizes_in: list[int], sizes_out: list[int], nbytes: int
    ) -> Pending:
        """Send the r-th part of `sent` to rank r, and fill `received` with the parts from all. Collective.

        Shapes: received [sum(sizes_in)], sent [sum(sizes_out)]. `nbytes` is what all ranks send, for the ledger:
        it must be the same on all.
        """
        dtype = str(sent.dtype).removeprefix("torch.")
        token = self.telemetry.collective_begin(self.name, "all_to_all", dtype, nbytes, self.world_size)
        work = dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self.group, async_op=True)
        return Pending(self, [work], token, None)

    @one_collective
    def all_gather(self, full: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Fill `full` with every rank's `shard`, in rank order. Collective: all ranks of the group.

        Shapes: full [world_size * n], shard [n]. `shard` may be this rank's own part of `full`; if not, it is copied.
        """
        token = self._begin("all_gather", shard)
        self.sent_bytes += shard.nbytes * (self.world_size - 1)
        if not self._is_gloo(full):
            work = dist.all_gather_into_tensor(full, shard, group=self.group, async_op=True)
            return Pending(self, [work], token, None)
        if (near := self._peer_memory(shard.nbytes)) is not None:
            return Pending(self, [near.all_gather(full, shard, self._end_of(token))], token, None)
        chunks = full.chunk(self.world_size)
        works = self._exchange(chunks, [shard] * self.world_size, _TAG_ALL_GATHER)
        own = chunks[self.rank]
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard)
        return Pending(self, works, token, None, (full, shard))

    @one_collective
    def sum_gradient(self, full: torch.Tensor) -> Pending:
        """Sum a replicated gradient over the group, in place. Collective: all ranks of the group."""
        near = self._peer_memory(full.nbytes // self.world_size) if self._is_gloo(full) else None
        if near is None:
            return self.all_reduce(full)
        token = self._begin("all_reduce", full)
        self.sent_bytes += 2 * full.nbytes * (self.world_size - 1) // self.world_size
        return Pending(self, [near.all_reduce(full, self._end_of(token))], token, None)

    def gather_weights(self, full: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Fill `full` for a unit that is about to run. Collective: all ranks of the group."""
        return self.all_gather(full, shard)

    @one_collective
    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> Pending:
        """Give row r of `sent` to rank r, and fill `received` by rank. Collective: all ranks of the group.

        Shapes: both [world_size, n]. Neither may be touched before the wait.
        """
        token = self._begin("all_to_all", sent)
        self.sent_bytes += sent.nbytes * (self.world_size - 1) // self.world_size
        if not self._is_gloo(sent):
            work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
            assert work is not None
            return Pending(self, [work], token, None)
        works = self._exchange(received, sent, _TAG_ALL_TO_ALL)
        received[self.rank].copy_(sent[self.rank])
        return Pending(self, works, token, None, (received, sent))

    @one_collective
    def reduce_scatter(self, full: torch.Tensor, shard: torch.Tensor, accumulate: bool = False) -> Pending:
        """Sum `full` over the group and leave this rank's part in `shard`. Collective: all ranks of the group.

        Shapes: full [world_size * n], shard [n]. `shard` may be this rank's own part of `full`. With `accumulate` the
        sum is added to what `shard` holds. `full` must not be written before the wait, and is spent after it.
        """
        token = self._begin("reduce_scatter", full)
        self.sent_bytes += full.nbytes * (self.world_size - 1) // self.world_size
        if not self._is_gloo(full):
            if not accumulate:
                work = dist.reduce_scatter_tensor(shard, full, group=self.group, async_op=True)
                return Pending(self, [work], token, None)
            summed = self._pool.take(shard.numel(), shard.dtype, shard.device)
            work = dist.reduce_scatter_tensor(summed, full, group=self.group, async_op=True)

            def add() -> None:
                shard.add_(summed)
                self._pool.give(summed)

            return Pending(self, [work], token, add)

        if (near := self._peer_memory(shard.nbytes)) is not None:
            return Pending(self, [near.reduce_scatter(full, shard, accumulate, self._end_of(token))], token, None)
        chunks = full.chunk(self.world_size)
        parts = [self._pool.take(shard.numel(), full.dtype, full.device) for _ in self.peers]
        works = self._exchange(dict(zip(self.peers, parts, strict=True)), chunks, _TAG_REDUCE_SCATTER)
        own = chunks[self.rank]

        def reduce() -> None:
            if accumulate:
                shard.add_(own)
                for part in parts:
                    shard.add_(part)
            else:
                torch.add(own, parts[0], out=shard)
                for part in parts[1:]:
                    shard.add_(part)
            for part in parts:
                self._pool.give(part)

        return Pending(self, works, token, reduce, (full, parts))
