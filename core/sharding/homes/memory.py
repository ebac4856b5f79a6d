"""Homes in memory: the device's own, and the host's, pinned where a GPU reads it."""

from __future__ import annotations

import torch

from distui.core.ranks import streams
from distui.core.ranks.host_memory import page_buffer
from distui.core.ranks.streams import Copy
from distui.core.sharding.homes.home import DONE, Cell, Home, Transfer


class _Copying(Transfer):
    """A copy between a cell and `tensor`, beside what computes."""

    def __init__(self, copy: Copy, tensor: torch.Tensor) -> None:
        self._copy, self._tensor = copy, tensor

    def wait(self) -> None:
        """Have whoever computes where the tensor lies come after the copy."""
        self._copy.order(self._tensor)


class MemoryCell(Cell):
    """A tensor that rests in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.numel(), tensor.dtype)
        self.tensor = tensor
        self._copy: Copy | None = None
        """The last copy that reads or writes the tensor; those before it end before."""

    def fetch(self, out: torch.Tensor) -> Transfer:
        """Start to copy the tensor to `out`."""
        return self._start(out, self.tensor, out)

    def store(self, source: torch.Tensor) -> Transfer:
        """Start to copy `source` over the tensor."""
        return self._start(self.tensor, source, source)

    def _start(self, out: torch.Tensor, source: torch.Tensor, theirs: torch.Tensor) -> Transfer:
        holds = streams.machine.holds
        if not holds(out) and not holds(source):
            self.settle()
            if out.data_ptr() != source.data_ptr():
                out.copy_(source)
            return DONE
        copy = Copy(out, source)
        if holds(self.tensor):
            copy.order(self.tensor)  # a device's own memory is used by whoever computes there, and no cell is asked
        else:
            self._copy = copy
        return _Copying(copy, theirs)

    def settle(self) -> None:
        """Block the host until no copy is under way: it reads and writes the tensor itself."""
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.finish()

    def at_hand(self) -> torch.Tensor:
        """Return the tensor itself, to be read and written where it is."""
        self.settle()
        return self.tensor

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy of the elements [start, end), in host memory."""
        return self.at_hand()[start:end].detach().cpu().clone()

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on by `values`."""
        self.at_hand()[start : start + values.numel()].copy_(values)


class HostHome(Home):
    """Host memory, pinned for a GPU."""

    name = "cpu"

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._held_bytes = 0

    def cell(self, numel: int, dtype: torch.dtype) -> Cell:
        """Allocate a tensor of zeros."""
        buffer = page_buffer(numel * dtype.itemsize, self._pinned)
        self._held_bytes += buffer.numel()
        return MemoryCell(buffer[: numel * dtype.itemsize].view(dtype))

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that the cells take."""
        return self._held_bytes
