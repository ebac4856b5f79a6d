"""What ranks agree on while they run: who needs which parameters, whose gradients are complete, where each one is.

Ranks of one job may call other blocks, in another order, another number of times. So at stage 3 no rank enters a
collective because it believes that the others will. Instead there is one sequence of small messages, rounds: each rank
says what it needs now, what it expects to need next, and which sums of gradients it has begun; all learn the minimum,
which is the same everywhere, and act on it alike. A rank that needs nothing takes part until all have come to the end
of the pass. A round is one all-reduce of a few numbers on the host, and runs while a unit computes; on a GPU it goes
over gloo, beside the device's streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from distui.core.axes.groups import beside
from distui.core.errors import DistuiError
from distui.core.sharding.transport.transport import Pending, Transport
from distui.core.sharding.units.pool import BufferPool

NOTHING = 1 << 30


class Place(IntEnum):
    """Where a rank is, as far as the others must know it."""

    RUNNING = 0
    FORWARD_END = 1
    """A rank leaves it when no rank needs parameters."""
    BACKWARD_END = 2
    """From here on a rank leaves only with all others."""
    MET = 3
    """A step, or a gathering of everything: what a rank reads alone it reads before all do that, or after."""
    LET_GO = 4


class DisagreementError(DistuiError):
    """Ranks came to different ends: one is in a backward, another has let the model go."""


@dataclass(frozen=True, slots=True)
class Round:
    """What all ranks learned."""

    wanted: int | None
    """What some rank needs now, the first of several."""
    expected: int | None
    """What every rank expects to need next; None where they differ."""
    sent: list[int]
    """The gradients whose sum every rank has begun."""
    first_place: Place
    last_place: Place


class Agreement:
    """The rounds of one model; at most one is under way."""

    def __init__(self, group: dist.ProcessGroup, name: str, pool: BufferPool) -> None:
        """Collective: all ranks of `group`."""
        own = beside(group, backend="gloo")
        self.transport = Transport(own, name, pool)
        self._message = torch.empty(0, dtype=torch.int32)
        self._under_way: Pending | None = None

    def post(self, wanted: int | None, expected: int | None, sent: Sequence[bool], place: Place) -> None:
        """Start a round; the one before must be over. Collective: all ranks, some time."""
        assert self._under_way is None
        want = NOTHING if wanted is None else wanted
        hint = NOTHING if expected is None else expected
        self._message = torch.tensor([want, hint, -hint, place, -place, *sent], dtype=torch.int32)
        self._under_way = self.transport.all_reduce(self._message, op=dist.ReduceOp.MIN)

    def result(self) -> Round | None:
        """Return what the round under way brought; None where there is none."""
        if self._under_way is None:
            return None
        self._under_way.wait()
        self._under_way = None
        want, low, high, first, last, *sent = self._message.tolist()
        return Round(
            want if want < NOTHING else None,
            low if low == -high and low < NOTHING else None,
            [index for index, begun in enumerate(sent) if begun],
            Place(first),
            Place(-last),
        )

    def union(self, flags: bytearray, num_steps: int) -> bytearray:
        """Return which of `flags` are 1 on any rank. Collective: all ranks, in the same place.

        Raises: DisagreementError where the ranks have stepped another number of times: the backward passes that meet
        here do not belong to each other.
        """
        code = num_steps % 256
        message = torch.frombuffer(bytearray([code, 255 - code]) + flags, dtype=torch.uint8)
        self.transport.all_reduce(message, op=dist.ReduceOp.MAX).wait()
        first, last, *union = message.tolist()
        if 255 - last != first:
            raise DisagreementError(
                f"after {num_steps} optimizer steps this rank meets others that took more or fewer: some rank stepped "
                "without a backward of its own, or took a step alone; have every rank run a backward before each step, "
                "with a loss of zero (loss * 0) where it has nothing to learn"
            )
        return bytearray(union)
