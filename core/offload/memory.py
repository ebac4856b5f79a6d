"""Homes in memory: the device's own, and the host's, pinned where a GPU reads it."""

from __future__ import annotations

import torch

from distui.core.offload.home import DONE, Cell, Home, Transfer, page_buffer

_streams: dict[torch.device, torch.cuda.Stream] = {}


class _CopyOnStream(Transfer):
    """A copy on the side stream: the host waits for what it reads, a GPU's stream for what it reads."""

    def __init__(self, event: torch.cuda.Event, device: torch.device, to_host: bool) -> None:
        self._event, self._device, self._to_host = event, device, to_host

    def wait(self) -> None:
        """Wait on the host, or let the device's current stream wait."""
        if self._to_host:
            self._event.synchronize()
        else:
            torch.cuda.current_stream(self._device).wait_event(self._event)


def copy_async(out: torch.Tensor, source: torch.Tensor) -> Transfer:
    """Start a copy; between a GPU and the host it runs on a side stream, beside what computes."""
    if out.device.type != "cuda" and source.device.type != "cuda":
        if out.data_ptr() != source.data_ptr():
            out.copy_(source)
        return DONE
    device = out.device if out.device.type == "cuda" else source.device
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        out.copy_(source, non_blocking=True)
        event.record(stream)
    for tensor in (out, source):
        if tensor.device.type == "cuda":
            tensor.record_stream(stream)
    return _CopyOnStream(event, device, to_host=out.device.type != "cuda")


class MemoryCell(Cell):
    """A tensor that rests in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.numel(), tensor.dtype)
        self.tensor = tensor

    def fetch(self, out: torch.Tensor) -> Transfer:
        """Start to copy the tensor to `out`."""
        return copy_async(out, self.tensor)

    def store(self, source: torch.Tensor) -> Transfer:
        """Start to copy `source` over the tensor."""
        return copy_async(self.tensor, source)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy of the elements [start, end), in host memory."""
        return self.tensor[start:end].detach().cpu().clone()

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on by `values`."""
        self.tensor[start : start + values.numel()].copy_(values)


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
