"""A transport whose gradients, and weights at stage 3, travel in 8 bits.

A reduce-scatter becomes: quantise each peer's part by blocks, all-to-all, dequantise, sum in the buffer's own format.
So a value is rounded once on its way, not once a hop. With several nodes it takes two hops: first inside a node, where
the ranks sum what goes to the same place, then between nodes, so that between nodes only 1/ranks-of-a-node travels.
An all-reduce is that, and an all-gather of each owner's quantised sum. Every rank, the owner too, takes what was sent,
so replicated values are the same to the last bit everywhere.

Source: ZeRO++, arXiv 2306.10209: section 3.1 (weights), 3.3 (gradients, hierarchical all-to-all).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from distui.core.axes.groups import split
from distui.core.config.schema import CompressionSection
from distui.core.errors import UserError
from distui.core.sharding.optim.onebit_adam import OneBitAdam
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units.pool import BufferPool
from distui.kernels.quantize import Format, dequantize_blockwise, quantize_blockwise

if TYPE_CHECKING:
    from distui.core.sharding.optim.optim import ShardedOptimizer
    from distui.core.sharding.units.unit import Unit

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Formats:
    """What travels how: None leaves it exact."""

    gradients: Format | None = None
    weights: Format | None = None
    block: int = 256
    ranks_per_node: int | None = None
    """Where this divides the group into several nodes, gradients take two hops."""


@dataclass(frozen=True, slots=True)
class Compression:
    """What of a model's traffic is compressed."""

    gradients: Literal["onebit", "int8", "fp8"] | None = None
    weights: Format | None = None
    block: int = 256
    warmup_steps: int = 100
    ranks_per_node: int | None = None

    @classmethod
    def of(cls, section: CompressionSection) -> Compression | None:
        """Return what the settings ask for; None where nothing is compressed."""
        if section.gradients == "none" and section.weights == "none":
            return None
        nodes = os.environ.get("LOCAL_WORLD_SIZE")
        return cls(
            None if section.gradients == "none" else section.gradients,
            None if section.weights == "none" else section.weights,
            section.block_size,
            section.warmup_steps,
            int(nodes) if nodes else None,
        )


def make_transport(
    group: dist.ProcessGroup, name: str, pool: BufferPool, compression: Compression | None, gradients: bool = True
) -> Transport:
    """Return the transport of `group`; without `gradients` it is one for weights only. Collective."""
    if compression is None:
        return Transport(group, name, pool)
    form = compression.gradients if gradients and compression.gradients != "onebit" else None
    if form is None and compression.weights is None:
        return Transport(group, name, pool)
    formats = Formats(form, compression.weights, compression.block, compression.ranks_per_node)
    return CompressedTransport(group, name, pool, formats)


def start_onebit(
    optimizer: ShardedOptimizer, units: list[Unit], transport: Transport, pool: BufferPool, compression: Compression
) -> OneBitAdam:
    """Return the 1-bit Adam that takes over from `optimizer` after the warm-up."""
    if units and units[0].placement.shards_optimizer:
        raise UserError(
            f"compression.gradients=onebit with zero_stage={units[0].placement.stage}",
            "every rank must hold the whole momentum",
            "set strategy.zero_stage to 0, or compression.gradients to int8 or fp8",
        )
    warmup = compression.warmup_steps
    return OneBitAdam(optimizer.inner, optimizer.runs, units, transport, pool, warmup)


class Chain(Pending):
    """Collectives of which each needs the result of the one before; `wait` goes through all of them."""

    __slots__ = ("_first", "_then")

    def __init__(self, first: Pending, then: Callable[[], Pending | None]) -> None:
        self._first, self._then = first, then

    @property
    def is_done(self) -> bool:
        """False: what follows is begun by a wait."""
        return False

    def wait(self) -> None:
        """Block until the last one's result is in its buffer."""
        self._first.wait()
        then, self._then = self._then, _nothing
        following = then()
        if following is not None:
            following.wait()


def _nothing() -> None:
    return None


class Codec:
    """Flat tensors as byte messages: [scales | 8-bit elements], padded to whole words."""

    def __init__(self, form: Format, block: int) -> None:
        self.form, self.block = form, block

    def message_bytes(self, numel: int) -> int:
        """Return the size of a message of `numel` elements."""
        numel = max(numel, 1)  # gloo never ends a send of no bytes
        return _SCALE_BYTES * (-(-numel // self.block)) + -(-numel // _SCALE_BYTES) * _SCALE_BYTES

    def write(self, values: torch.Tensor, message: torch.Tensor) -> None:
        """Quantise `values` into `message`, of which they may fill only the front."""
        q, scales = quantize_blockwise(values, self.block, self.form)
        at = scales.nbytes
        message[:at].copy_(scales.view(torch.uint8))
        message[at : at + q.numel()].copy_(q.view(torch.uint8))

    def read(self, message: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `message` holds to `out`, whose size says how much it is."""
        at = _SCALE_BYTES * (-(-out.numel() // self.block))
        q = message[at : at + out.numel()].view(torch.int8 if self.form == "int8" else torch.float8_e4m3fn)
        dequantize_blockwise(q, message[:at].view(torch.float32), out=out, block=self.block)


class CompressedTransport(Transport):
    """A `Transport` with `formats`. What is not a gradient or a weight to compute with (norms, states) stays exact."""

    def __init__(self, group: dist.ProcessGroup, name: str, pool: BufferPool, formats: Formats) -> None:
        """Collective: all ranks of the group, where gradients take two hops."""
        super().__init__(group, name, pool)
        self._gradients = Codec(formats.gradients, formats.block) if formats.gradients else None
        self._weights = Codec(formats.weights, formats.block) if formats.weights else None
        self.shares_scales = self._gradients is not None
        per_node = formats.ranks_per_node or self.world_size
        if self._gradients is not None and 1 < per_node < self.world_size and self.world_size % per_node == 0:
            self.hops = self._split(per_node)

    def _split(self, per_node: int) -> tuple[Transport, Transport]:
        inside, outside = split(self.group, per_node)
        return (
            Transport(inside, f"{self.name}_in_node", self._pool),
            Transport(outside, f"{self.name}_between_nodes", self._pool),
        )

    # ---- gradients -----------------------------------------------------------------------------------------------

    def reduce_scatter(self, full: torch.Tensor, shard: torch.Tensor, accumulate: bool = False) -> Pending:
        """Sum `full` over the group and leave this rank's part in `shard`. Collective: all ranks of the group.

        As in `Transport`; a value errs by half a step of its block for each of the ranks that sent it.
        """
        if self._gradients is None or not _compressible(full):
            return super().reduce_scatter(full, shard, accumulate)
        return self._sum(self._gradients, list(full.split(shard.numel())), shard, accumulate)

    def sum_gradient(self, full: torch.Tensor) -> Pending:
        """Sum `full` over the group, in place: equal on all ranks to the last bit. Collective: all ranks."""
        codec = self._gradients
        if codec is None or not _compressible(full):
            return super().sum_gradient(full)
        size = -(-full.numel() // self.world_size)
        parts = [full[rank * size : (rank + 1) * size] for rank in range(self.world_size)]
        own = parts[self.rank]
        return Chain(self._sum(codec, parts, own, False), lambda: self._spread(codec, parts, own, size))

    def _sum(self, codec: Codec, parts: list[torch.Tensor], into: torch.Tensor, accumulate: bool) -> Pending:
        """Leave in `into`, or add to it, the sum over the ranks of part `self.rank`; `into` may be that part."""
        own = parts[self.rank]

        def put(total: torch.Tensor) -> None:
            if accumulate:
                into.add_(total)
            elif into.data_ptr() != total.data_ptr():
                into.copy_(total)

        if not self.hops:

            def add(rows: list[list[torch.Tensor]]) -> None:
                put(own)
                for peer in self.peers:
                    into.add_(rows[peer][0])

            return self._swap(self, codec, [[part] for part in parts], add)

        inside, outside = self.hops
        columns = [parts[place :: inside.world_size] for place in range(inside.world_size)]
        sums = [part.float().clone() for part in columns[inside.rank]]

        def add_inside(rows: list[list[torch.Tensor]]) -> None:
            for peer in inside.peers:
                for total, part in zip(sums, rows[peer], strict=True):
                    total.add_(part)

        def add_outside(rows: list[list[torch.Tensor]]) -> None:
            for peer in outside.peers:
                sums[outside.rank].add_(rows[peer][0])
            put(sums[outside.rank])

        return Chain(
            self._swap(inside, codec, columns, add_inside),
            lambda: self._swap(outside, codec, [[total] for total in sums], add_outside),
        )

    def _swap(
        self,
        over: Transport,
        codec: Codec,
        rows: list[list[torch.Tensor]],
        take: Callable[[list[list[torch.Tensor]]], None],
    ) -> Pending:
        """Send the tensors of row r to rank r of `over`; `take` gets what each rank sent, in fp32."""
        longest = max(part.numel() for row in rows for part in row)
        nbytes, device = codec.message_bytes(longest), rows[0][0].device
        width = nbytes * len(rows[0])
        buffers = [self._pool.take(over.world_size * width, torch.uint8, device) for _ in range(2)]
        sent, received = (buffer.view(over.world_size, width) for buffer in buffers)
        for peer, row in enumerate(rows):
            if peer != over.rank:
                for index, part in enumerate(row):
                    codec.write(part, sent[peer, index * nbytes : (index + 1) * nbytes])

        def finish() -> None:
            sizes = [part.numel() for part in rows[over.rank]]
            values: list[list[torch.Tensor]] = []
            for peer in range(over.world_size):
                row = []
                for index, numel in enumerate(sizes):
                    value = torch.empty(numel if peer != over.rank else 0, dtype=torch.float32, device=device)
                    if peer != over.rank:
                        codec.read(received[peer, index * nbytes : (index + 1) * nbytes], value)
                    row.append(value)
                values.append(row)
            take(values)
            for buffer in buffers:
                self._pool.give(buffer)

        return Chain(Transport.all_to_all(over, received, sent), finish)

    # ---- values that become the same everywhere ----------------------------------------------------------------

    def _spread(self, codec: Codec, parts: list[torch.Tensor], own: torch.Tensor, size: int) -> Pending:
        nbytes = codec.message_bytes(size)
        buffer = self._pool.take(self.world_size * nbytes, torch.uint8, own.device)
        messages = buffer.view(self.world_size, nbytes)
        codec.write(own, messages[self.rank])
        pending = Transport.all_gather(self, buffer, messages[self.rank])

        def finish() -> None:
            for part, message in zip(parts, messages, strict=True):
                codec.read(message, part)
            self._pool.give(buffer)

        return Chain(pending, finish)

    def gather_weights(self, full: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Fill `full` with every rank's quantised `shard`; the shard itself stays exact. Collective: all ranks."""
        if self._weights is None or not _compressible(full):
            return super().gather_weights(full, shard)
        return self._spread(self._weights, list(full.split(shard.numel())), shard, shard.numel())


def _compressible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() <= 4
