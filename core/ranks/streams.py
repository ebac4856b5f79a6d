"""Streams, events, and copies between a device's memory and the host's: nothing else in core makes any.

A device with streams works behind the host, so "after" means one of two things. Whoever computes on the device comes
after something when the stream that is current waits for it; the host, which goes on meanwhile, when it has waited
itself. A copy that reads pinned memory may be over for the first and under way for the second. So whoever waits says
for which tensor, and `Copy.order` does what its place demands.

Everything goes through `machine`, in whose place a test puts one that records who read and wrote what, and fails on a
use that nothing orders (tests/recording.py). docs/architecture.md, "What orders what on a GPU", lists all of it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from distui.core.errors import UserError

Stream = Any
"""A stream of the machine's; only compared, and given back to it."""


class Mark(ABC):
    """A point in a stream."""

    @abstractmethod
    def order(self, device: torch.device) -> None:
        """Have the stream that is current on `device` come after it; the host goes on."""

    @abstractmethod
    def wait(self) -> None:
        """Block the host until the stream has passed it."""


class Machine(ABC):
    """What streams and copies are made of."""

    @abstractmethod
    def is_apart(self, device: torch.device) -> bool:
        """Whether `device` has a memory of its own, and streams that work behind the host."""

    @abstractmethod
    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the memory of such a device."""

    @abstractmethod
    def current(self, device: torch.device) -> Stream:
        """Return the stream in which this thread computes on `device`."""

    @abstractmethod
    def follow(self, stream: Stream, other: Stream) -> None:
        """Have `stream` come after all that `other` has been given."""

    @abstractmethod
    def mark(self, device: torch.device) -> Mark:
        """Mark where the stream that is current on `device` stands."""

    @abstractmethod
    def copy_beside(self, out: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy on the device's side stream, after all that its current stream was given; mark the end.

        Copies of one device follow each other. The memory of a device stays until the copy is over, whoever lets go.
        """

    @abstractmethod
    def copy_in_line(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the stream that is current, behind the host."""

    @abstractmethod
    def keep(self, tensor: torch.Tensor) -> None:
        """Have the memory of `tensor`, which another stream made, stay until the current one is done with it."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Lock host memory for copies of devices; return what unlocks it, once no copy is under way."""


class _CudaMark(Mark):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def order(self, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class Cuda(Machine):
    """NVIDIA's GPUs, and AMD's under the same names; on a CPU nothing is apart, and nothing else is called."""

    def __init__(self) -> None:
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def is_apart(self, device: torch.device) -> bool:
        """Whether it is a GPU."""
        return device.type == "cuda"

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is on a GPU."""
        return tensor.device.type == "cuda"

    def current(self, device: torch.device) -> Stream:
        """Return torch's current stream."""
        return torch.cuda.current_stream(device)

    def follow(self, stream: Stream, other: Stream) -> None:
        """Wait by an event."""
        stream.wait_stream(other)

    def mark(self, device: torch.device) -> Mark:
        """Record an event."""
        return _CudaMark(torch.cuda.current_stream(device))

    def copy_beside(self, out: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy on one stream a GPU: fetching what was just stored needs no further order."""
        device = out.device if self.holds(out) else source.device
        stream = self._beside.get(device)
        if stream is None:
            stream = self._beside[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            out.copy_(source, non_blocking=True)
        for tensor in (out, source):
            if self.holds(tensor):
                tensor.record_stream(stream)
        return _CudaMark(stream)

    def copy_in_line(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """Copy without blocking."""
        out.copy_(source, non_blocking=True)

    def keep(self, tensor: torch.Tensor) -> None:
        """Tell the caching allocator."""
        tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Register the memory with the driver. Raises: UserError where it has no more to lock."""
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(address, nbytes, 0))
        if status:
            raise UserError(
                f"{nbytes:,} bytes of host memory cannot be locked for the GPU",
                f"cudaHostRegister returned {status}: too little memory is free, or the process may not lock it",
                "offload less (offload.params or offload.optimizer = none, or nvme), or use fewer ranks on this node",
            )

        owner = os.getpid()

        def unpin() -> None:
            if os.getpid() == owner:  # a forked child has neither the memory nor the GPU
                torch.cuda.synchronize()  # a copy may still read or write it
                runtime.cudaHostUnregister(address)

        return unpin


machine: Machine = Cuda()


class Copy:
    """A copy under way between a device and the host; both tensors live until it is over."""

    def __init__(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """Start it, beside what computes."""
        self._mark: Mark | None = machine.copy_beside(out, source)
        self._tensors = (out, source)

    def order(self, tensor: torch.Tensor) -> None:
        """Have whoever computes where `tensor`, one of the two, lies come after the copy."""
        if self._mark is None:
            return
        if machine.holds(tensor):
            self._mark.order(tensor.device)
        else:
            self.finish()

    def finish(self) -> None:
        """Block the host until the copy is over."""
        mark, self._mark, self._tensors = self._mark, None, ()  # type: ignore[assignment]
        if mark is not None:
            mark.wait()


class Line:
    """One order for what the engine does on a device, whichever stream the script makes current in the meantime."""

    def __init__(self, device: torch.device, on_change: Callable[[], None]) -> None:
        """`on_change` is called in a stream that is another than the one before."""
        self._device, self._on_change = device, on_change
        self._last: Stream = None

    def join(self) -> None:
        """Have the current stream come after that of the call before."""
        now = machine.current(self._device)
        last, self._last = self._last, now
        if last is not None and last != now:
            machine.follow(now, last)
            self._on_change()


def line_of(device: torch.device, on_change: Callable[[], None]) -> Line | None:
    """Return a line of `device`; None where it works with the host."""
    return Line(device, on_change) if machine.is_apart(device) else None


def reader(tensor: torch.Tensor) -> Callable[[], float]:
    """Return what reads the number in `tensor`, on any thread, as it is at this point of the stream."""
    if not machine.holds(tensor):
        value = float(tensor)
        return lambda: value
    mark = machine.mark(tensor.device)

    def read() -> float:
        mark.wait()  # another thread's stream is another
        return float(tensor)

    return read
