"""A unit whose share of the states other ranks hold as well: its gradient is summed over them before a step."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from distui.core.sharding.homes.home import Waitable
from distui.core.sharding.transport.replicas import Replicas
from distui.core.sharding.transport.transport import Transport


class Copies:
    """The part of `Unit` that knows of copies; without any, `replicas` is None and a shard is summed by one hop."""

    replicas: Replicas | None = None
    is_summed = False
    """Whether the gradient's shard holds the sum over the copies, or only that of the ranks that share the states."""
    transport: Transport | None

    def gradient(self, writes: bool = False) -> AbstractContextManager[torch.Tensor]:
        """Give this rank's shard of the reduced gradient."""
        raise NotImplementedError

    @property
    def has_gradient(self) -> bool:
        """Whether there is one."""
        raise NotImplementedError

    def finish_reduce(self) -> None:
        """Wait for the sum."""
        raise NotImplementedError

    def _sum_into(self, shard: torch.Tensor, full: torch.Tensor, accumulate: bool, last: bool) -> Waitable:
        """Start to sum `full` into `shard`, or add it; over the copies with the `last` backward of a step."""
        assert self.transport is not None
        if self.replicas is None:
            return self.transport.reduce_scatter(full, shard, accumulate)
        if accumulate and self.is_summed:
            shard.mul_(1.0 / self.replicas.num)  # it will be summed once more
        self.is_summed = last
        if last:
            return self.replicas.reduce_scatter(self.transport, full, shard, accumulate)
        return self.transport.reduce_scatter(full, shard, accumulate)

    def finish_gradient(self) -> None:
        """Wait for the sum, and have it over the copies too, whatever backward was said to be the last. Collective."""
        self.finish_reduce()
        if self.replicas is not None and self.has_gradient and not self.is_summed:
            with self.gradient(writes=True) as shard:
                self.replicas.across.sum_gradient(shard).wait()
            self.is_summed = True
