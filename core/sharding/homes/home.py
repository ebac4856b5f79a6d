"""The interface of a home: it keeps flat tensors in cells; fetching and storing them is asynchronous."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from distui.core.ranks import streams
from distui.core.ranks.host_memory import page_buffer

SHARD_MULTIPLE = 2048
"""Elements that shards of offloaded units are padded to: whole pages in every format of 2 bytes or more."""


def flat_buffer(numel: int, dtype: torch.dtype, device: torch.device, aligned: bool = True) -> torch.Tensor:
    """Return a flat tensor of zeros; on the host page-aligned, so that disks read and write it without a copy."""
    with torch.inference_mode(False):  # as `page_buffer`; a view in another format would be an inference tensor too
        if device.type != "cpu" or streams.machine.is_apart(device) or not aligned:
            return torch.zeros(numel, dtype=dtype, device=device)
        nbytes = numel * dtype.itemsize
        return page_buffer(nbytes)[:nbytes].view(dtype)


class Waitable(Protocol):
    """Something under way: a transfer, or a collective."""

    def wait(self) -> None:
        """Return when it is over."""


class Transfer(ABC):
    """Data on its way between a cell and a tensor; what of it concerns the cell is the cell's own to order."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the tensor may be used again where it lies: read after `fetch`, overwritten after `store`.

        On a GPU its current stream waits, on the host the caller does. Raises: UserError where the home failed.
        """


class Done(Transfer):
    """Nothing is on its way."""

    def wait(self) -> None:
        """Return at once."""


DONE = Done()


class Sequel(Transfer):
    """A transfer, and what is to be done once when it is over."""

    def __init__(self, first: Waitable, then: Callable[[], None]) -> None:
        self._first, self._then = first, [then]

    def wait(self) -> None:
        """Wait for the transfer and do the rest, which happens once."""
        self._first.wait()
        if self._then:
            self._then.pop()()


class Cell(ABC):
    """A flat tensor at rest."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self.numel, self.dtype = numel, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    @abstractmethod
    def fetch(self, out: torch.Tensor) -> Transfer:
        """Start to bring the tensor into `out` (flat, same length and dtype, on any device)."""

    @abstractmethod
    def store(self, source: torch.Tensor) -> Transfer:
        """Start to replace the tensor by `source`, which must stay as it is until the transfer is over."""

    @abstractmethod
    def settle(self) -> None:
        """Block until no transfer reads or writes the cell. Raises: UserError where the home failed."""

    @abstractmethod
    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy of the elements [start, end), in host memory."""

    @abstractmethod
    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on by `values` (flat)."""


class Home(ABC):
    """Keeps cells."""

    name: str
    """As in the configuration: cpu or nvme."""

    @abstractmethod
    def cell(self, numel: int, dtype: torch.dtype) -> Cell:
        """Make room for a flat tensor. What it holds before the first store is zero.

        Raises: UserError where there is no room.
        """

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that the cells take."""


@dataclass(frozen=True, slots=True)
class CellSlice:
    """The elements [start, end) of a cell: a tensor that is not in memory."""

    cell: Cell
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """Format of the elements."""
        return self.cell.dtype

    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.start

    def dim(self) -> int:
        """1: it is flat."""
        return 1

    def part(self, start: int, end: int) -> CellSlice:
        """Return the elements [start, end) of it."""
        return CellSlice(self.cell, self.start + start, self.start + end)

    def read(self) -> torch.Tensor:
        """Return the elements, in host memory."""
        return self.cell.read(self.start, self.end)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace elements from `start` on."""
        self.cell.write(self.start + start, values)
