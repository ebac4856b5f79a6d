"""What stages of a pipeline send each other: the tensors between two blocks forward, their gradients backward.

Every message has a head of fixed size on a group of its own on the CPU: formats and shapes, so that these may change
with every micro-batch, or that the sender failed, so that nobody waits for what never comes. A send is kept until it is
over, and is never waited for inside the schedule: who waits for a send may be the one that its receiver waits for.
Messages are told apart by the stage that they go to, for a rank may have several; one to itself stays where it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distui.core.axes.groups import Axes, beside
from distui.core.errors import DistuiError, UserError
from distui.core.ranks import ops

FORWARD, BACKWARD = 0, 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_MAX_DIMS, _MAX_TENSORS = 6, 6
_HEAD = 3 + _MAX_TENSORS * (3 + _MAX_DIMS)
_FAILED = -1

Parts = tuple[torch.Tensor | None, ...]


class PeerFailed(DistuiError):
    """A neighbour has left the schedule by an exception; what it was is told at the end."""


class Messages:
    """The line of stages that one rank is in."""

    def __init__(self, axes: Axes, num_stages: int, rank_of: Callable[[int], int]) -> None:
        """Make the groups; `rank_of` says which of the line has a stage. Collective: the world."""
        group = axes["pp"]
        assert group is not None
        self.ranks, self.index = axes.peers("pp"), axes.index("pp")
        self._num_stages, self._rank_of = num_stages, rank_of
        self.control = beside(group, backend="gloo")
        # On NCCL what two ranks exchange goes through one queue: each direction to a stage has one of its own.
        self._is_apart = "nccl" in dist.get_backend_config(group)
        self._data = [beside(group) if self._is_apart else self.control for _ in range(2 * num_stages)]
        self.exposed_s = 0.0
        """Seconds that the training thread waited for messages; the engine reads and resets it each step."""
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._own: dict[int, deque[tuple[Parts, bool]]] = {}
        """To stages of this rank itself: what lies there, by channel."""

    def send(self, direction: int, stage: int, parts: Sequence[torch.Tensor | None], is_tuple: bool = False) -> None:
        """Send from `stage` to the one behind (FORWARD) or before; returns at once.

        Raises: UserError for what no message can hold.
        """
        channel, there = self._channel(direction, stage + (1 if direction == FORWARD else -1))
        if there == self.index:
            kept = tuple(
                None if part is None else part.detach().requires_grad_(part.requires_grad and part.is_floating_point())
                for part in parts
            )
            self._own.setdefault(channel, deque()).append((kept, is_tuple))
            return
        head = [0] * _HEAD
        head[:2] = len(parts), int(is_tuple)
        if len(parts) > _MAX_TENSORS:
            raise UserError(
                f"a block gives {len(parts)} tensors to the next stage",
                f"a message of the pipeline holds {_MAX_TENSORS}",
                "give fewer between blocks, or set strategy.pipeline_parallel to 1",
            )
        for number, part in enumerate(parts):
            at = 3 + number * (3 + _MAX_DIMS)
            if part is None:
                head[at] = -1
                continue
            if part.dtype not in _DTYPES or part.dim() > _MAX_DIMS:
                raise UserError(
                    f"a block gives a {str(part.dtype).removeprefix('torch.')} tensor of {part.dim()} dimensions",
                    f"between stages travel {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)} of up to "
                    f"{_MAX_DIMS} dimensions",
                    "give the next block another format, or set strategy.pipeline_parallel to 1",
                )
            head[at : at + 3] = _DTYPES.index(part.dtype), int(part.requires_grad), part.dim()
            head[at + 3 : at + 3 + part.dim()] = part.shape
        peer, group = self.ranks[there], self._data[channel]
        self._isend(torch.tensor(head, dtype=torch.int64), peer, self.control, 2 * channel)
        for part in parts:
            if part is not None and part.numel():
                travelling = part.detach().contiguous().to(self._device_over(part.device, group))
                self._isend(travelling, peer, group, 2 * channel + 1)
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]

    def receive(self, direction: int, stage: int, device: torch.device) -> tuple[Parts, bool]:
        """Wait for what the stage before `stage` (FORWARD) or behind sent; return it, and whether it was a tuple.

        Raises: PeerFailed where that one has failed.
        """
        channel, _ = self._channel(direction, stage)
        if self._own.get(channel):
            return self._own[channel].popleft()
        peer = self.ranks[self._rank_of(stage + (-1 if direction == FORWARD else 1))]
        group = self._data[channel]
        head = torch.empty(_HEAD, dtype=torch.int64)
        self._recv(head, peer, self.control, 2 * channel)
        values = head.tolist()
        if values[0] == _FAILED:
            raise PeerFailed("a neighbouring stage failed")
        parts: list[torch.Tensor | None] = []
        for number in range(values[0]):
            at = 3 + number * (3 + _MAX_DIMS)
            if values[at] < 0:
                parts.append(None)
                continue
            shape = values[at + 3 : at + 3 + values[at + 2]]
            part = torch.empty(shape, dtype=_DTYPES[values[at]], device=self._device_over(device, group))
            if part.numel():
                self._recv(part, peer, group, 2 * channel + 1)
            parts.append(part.to(device).requires_grad_(bool(values[at + 1])))
        return tuple(parts), bool(values[1])

    def fail(self) -> None:
        """Tell all neighbours to expect nothing more; they tell theirs."""
        head = torch.full((_HEAD,), _FAILED, dtype=torch.int64)
        for stage in range(self._num_stages):
            for direction, sender in ((FORWARD, stage - 1), (BACKWARD, stage + 1)):
                if 0 <= sender < self._num_stages and self._rank_of(sender) == self.index:
                    channel, there = self._channel(direction, stage)
                    if there != self.index:
                        self._isend(head, self.ranks[there], self.control, 2 * channel)

    def finish(self) -> None:
        """Wait until all that was sent is there."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _device_over(self, device: torch.device, group: dist.ProcessGroup) -> torch.device:
        return ops.device_over(device, group) if self._is_apart else torch.device("cpu")  # gloo sends from the host

    def _channel(self, direction: int, stage: int) -> tuple[int, int]:
        """Return which messages go to `stage` from there, and who of the line has it."""
        return 2 * stage + direction, self._rank_of(stage)

    def _isend(self, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> None:
        self._sent.append((dist.isend(tensor, peer, group=group, tag=tag), tensor))

    def _recv(self, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> None:
        begin = time.perf_counter()
        work = dist.irecv(tensor, peer, group=group, tag=tag)
        assert work is not None
        work.wait()
        self.exposed_s += time.perf_counter() - begin
