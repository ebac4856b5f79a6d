"""Gradients in two hops: reduce-scattered where the states are shared, then summed over the copies of each share.

Only a share of a gradient travels between copies, which may be on other nodes, and only once a step: micro-batches
before the last are summed near by. The second sums follow the order in which the first ones were begun, whoever waits
for which, so it is one on all ranks.

Source: MiCS, arXiv 2205.00119, section 3.4 (2-hop gradient synchronisation).
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from distui.core.sharding.transport.transport import Pending, Transport


class Replicas:
    """The ranks that hold copies of this one's share of the states."""

    def __init__(self, across: Transport) -> None:
        """`across` is this rank and its copies."""
        self.across, self.num = across, across.world_size
        self._begun: deque[TwoSums] = deque()
        """Whose second sum is not under way, in the order of the first ones."""

    def reduce_scatter(self, inside: Transport, full: torch.Tensor, shard: torch.Tensor, accumulate: bool) -> Pending:
        """Sum `full` over `inside`, which shares the states, and what is then in `shard` over the copies.

        Collective: the sharers and their copies. Shapes and the rest as in `Transport.reduce_scatter`.
        """
        self.go_on()
        sums = TwoSums(self, inside.reduce_scatter(full, shard, accumulate), shard)
        self._begun.append(sums)
        return sums

    def go_on(self) -> None:
        """Begin the second sums of what is through with the first: on a GPU of all, which keeps no rank waiting."""
        while self._begun and (self._begun[0].is_on_gpu or self._begun[0].is_summed_inside):
            self._begun.popleft().begin_second()

    def begin_until(self, sums: TwoSums) -> None:
        """Begin the second sums up to this one's."""
        while sums in self._begun:
            self._begun.popleft().begin_second()

    def agree(self, norm: torch.Tensor) -> None:
        """Have all copies go by one number, in place: sums over their ranks may be rounded otherwise. Collective."""
        self.across.all_reduce(norm, op=dist.ReduceOp.MAX).wait()


class TwoSums(Pending):
    """A gradient on its way through both."""

    __slots__ = ("_first", "_replicas", "_second", "_shard")

    def __init__(self, replicas: Replicas, first: Pending, shard: torch.Tensor) -> None:
        self._replicas, self._first, self._shard = replicas, first, shard
        self._second: Pending | None = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether waiting holds up a stream, and not the host."""
        return self._shard.is_cuda

    @property
    def is_summed_inside(self) -> bool:
        """Whether the first sum is there."""
        return self._first.is_done

    @property
    def is_done(self) -> bool:
        """Whether a wait would end at once, as far as is known."""
        self._replicas.go_on()
        return self._second is not None and self._second.is_done

    def begin_second(self) -> None:
        """Wait for the first sum and begin the one over the copies."""
        self._first.wait()
        self._second = self._replicas.across.sum_gradient(self._shard)

    def wait(self) -> None:
        """Block until the sum is in its shard."""
        self._replicas.begin_until(self)
        assert self._second is not None
        self._second.wait()
