"""Host copies of what a save writes, so that training may go on while files are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from distui.core.checkpoint.flat import FlatShard


class Staging:
    """Copies tensors to host memory (pinned, where they are on a GPU) that is kept for the next save.

    What lies in one flat buffer travels in one copy, however many parameters it holds.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    @property
    def allocated_bytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(buffer.numel() for buffer in self._buffers)

    def copy(self, items: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """Return `items` on the host, and what waits until the copies are there (it may run on any thread).

        The copies of the call before are overwritten.
        """
        extents: dict[tuple[torch.device, int], list[int]] = {}
        for item in items.values():
            source = _source(item)
            if source.numel():
                begin, end = _extent(source)
                extent = extents.setdefault(_storage(source), [begin, end])
                extent[:] = min(extent[0], begin), max(extent[1], end)
        free: dict[tuple[int, bool], list[torch.Tensor]] = defaultdict(list)
        for buffer in self._buffers:
            free[buffer.numel(), buffer.is_pinned()].append(buffer)
        self._buffers = []
        hosts: dict[tuple[torch.device, int], torch.Tensor] = {}
        copies: dict[str, torch.Tensor] = {}
        for name, item in items.items():
            source = _source(item)
            if not source.numel():
                copies[name] = _like(item, torch.empty(0, dtype=source.dtype))
                continue
            key = _storage(source)
            first, last = extents[key]
            if key not in hosts:
                pinned = source.device.type == "cuda"
                found = free[last - first, pinned]
                host = found.pop() if found else torch.empty(last - first, dtype=torch.uint8, pin_memory=pinned)
                whole = torch.empty(0, dtype=torch.uint8, device=source.device)
                whole.set_(source.untyped_storage(), first, (last - first,), (1,))
                host.copy_(whole, non_blocking=True)
                hosts[key] = host
                self._buffers.append(host)
            begin, end = _extent(source)
            copies[name] = _like(item, hosts[key][begin - first : end - first].view(source.dtype).view(source.shape))
        return copies, _arrival({device for device, _ in hosts})


def _source(item: torch.Tensor) -> torch.Tensor:
    return item.local if isinstance(item, FlatShard) else item.detach().contiguous()


def _like(item: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    return FlatShard(host, item.start, item.numel()) if isinstance(item, FlatShard) else host


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + tensor.numel() * tensor.element_size()


def _arrival(devices: set[torch.device]) -> Callable[[], None]:
    events = []
    for device in devices:
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait
