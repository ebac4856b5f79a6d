"""What stages of a pipeline send each other: the tensors between two blocks forward, their gradients backward.

Every message has a head of fixed size on a group of its own on the CPU: formats and shapes, so that these may change
with every micro-batch, or that the sender failed, so that nobody waits for what never comes. A send is kept until it is
over, and is never waited for inside the schedule: who waits for a send may be the one that its receiver waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def __init__(self, axes: Axes) -> None:
        """Make the groups. Collective: the world."""
        group = axes["pp"]
        assert group is not None
        self.ranks, self.index = axes.peers("pp"), axes.index("pp")
        self.control = beside(group, backend="gloo")
        # On NCCL what two ranks exchange goes through one queue: each direction has one of its own.
        self._is_apart = "nccl" in dist.get_backend_config(group)
        self._data = [beside(group), beside(group)] if self._is_apart else [self.control, self.control]
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def send(self, direction: int, parts: Sequence[torch.Tensor | None], is_tuple: bool = False) -> None:
        """Send to the neighbour behind (FORWARD) or before; returns at once.

        Raises: UserError for what no message can hold.
        """
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
        peer, group = self._peer(direction, 1), self._data[direction]
        self._isend(torch.tensor(head, dtype=torch.int64), peer, self.control, 2 * direction)
        for part in parts:
            if part is not None and part.numel():
                travelling = part.detach().contiguous().to(self._device_over(part.device, group))
                self._isend(travelling, peer, group, 2 * direction + 1)
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]

    def receive(self, direction: int, device: torch.device) -> tuple[Parts, bool]:
        """Wait for what the neighbour before (FORWARD) or behind sent; return it, and whether it was a tuple.

        Raises: PeerFailed where that one has failed.
        """
        peer, group = self._peer(direction, -1), self._data[direction]
        head = torch.empty(_HEAD, dtype=torch.int64)
        self._recv(head, peer, self.control, 2 * direction)
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
                self._recv(part, peer, group, 2 * direction + 1)
            parts.append(part.to(device).requires_grad_(bool(values[at + 1])))
        return tuple(parts), bool(values[1])

    def fail(self) -> None:
        """Tell both neighbours to expect nothing more; they tell theirs."""
        head = torch.full((_HEAD,), _FAILED, dtype=torch.int64)
        for direction, there in ((FORWARD, self.index + 1), (BACKWARD, self.index - 1)):
            if 0 <= there < len(self.ranks):
                self._isend(head, self.ranks[there], self.control, 2 * direction)

    def finish(self) -> None:
        """Wait until all that was sent is there."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _device_over(self, device: torch.device, group: dist.ProcessGroup) -> torch.device:
        return ops.device_over(device, group) if self._is_apart else torch.device("cpu")  # gloo sends from the host

    def _peer(self, direction: int, step: int) -> int:
        return self.ranks[self.index + (step if direction == FORWARD else -step)]

    def _isend(self, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> None:
        self._sent.append((dist.isend(tensor, peer, group=group, tag=tag), tensor))

    def _recv(self, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> None:
        work = dist.irecv(tensor, peer, group=group, tag=tag)
        assert work is not None
        work.wait()
