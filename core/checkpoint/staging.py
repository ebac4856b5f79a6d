"""Host copies of what a save writes, so that training may go on while files are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distui.core.checkpoint.flat import FlatShard
from distui.core.ranks import streams
from distui.core.ranks.host_memory import page_buffer


class Staging:
    """Copies tensors to host memory (pinned, where they are on a GPU) that is kept for the next save.

    What lies in one flat buffer travels in one copy, however many parameters it holds.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, bool], list[torch.Tensor]] = defaultdict(list)
        """By size, and whether pinned."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(buffer.numel() for buffers in self._buffers.values() for buffer in buffers)

    def copy(self, items: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """Return `items` on the host, and what waits until the copies are there (it may run on any thread).

        The copies of the call before are overwritten. What is no tensor stays as it is.
        """
        copies: dict[str, Any] = {name: item for name, item in items.items() if not isinstance(item, torch.Tensor)}
        items = {name: item for name, item in items.items() if name not in copies}
        # Once each: of a tensor with gaps it is a copy, which must live until it has been copied.
        sources = {name: _source(item) for name, item in items.items()}
        extents: dict[tuple[torch.device, int], list[int]] = {}
        for source in sources.values():
            if source.numel():
                begin, end = _extent(source)
                extent = extents.setdefault(_storage(source), [begin, end])
                extent[:] = min(extent[0], begin), max(extent[1], end)
        free, self._buffers = self._buffers, defaultdict(list)
        hosts: dict[tuple[torch.device, int], torch.Tensor] = {}
        apart: set[torch.device] = set()
        for name, item in items.items():
            source = sources[name]
            if not source.numel():
                copies[name] = _like(item, torch.empty(0, dtype=source.dtype))
                continue
            key = _storage(source)
            first, last = extents[key]
            if key not in hosts:
                hosts[key] = self._copy(source, first, last - first, free)
                if streams.machine.holds(source):
                    apart.add(source.device)
            begin, end = _extent(source)
            copies[name] = _like(item, hosts[key][begin - first : end - first].view(source.dtype).view(source.shape))
        return copies, _arrival(apart)

    def _copy(
        self, source: torch.Tensor, first: int, size: int, free: dict[tuple[int, bool], list[torch.Tensor]]
    ) -> torch.Tensor:
        """Start to copy `size` bytes of the memory of `source`, and return where they arrive."""
        pinned = streams.machine.holds(source)
        found = free[size, pinned]
        buffer = found.pop() if found else page_buffer(size, True) if pinned else torch.empty(size, dtype=torch.uint8)
        self._buffers[size, pinned].append(buffer)
        host = buffer[:size]
        whole = torch.empty(0, dtype=torch.uint8, device=source.device)
        whole.set_(source.untyped_storage(), first, (size,), (1,))
        if pinned:
            streams.machine.copy_in_line(host, whole)  # what trains on comes after it
        else:
            host.copy_(whole)
        return host


def _source(item: torch.Tensor) -> torch.Tensor:
    return item.local if isinstance(item, FlatShard) else item.detach().contiguous()


def _like(item: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    return FlatShard(host, item.start, item.numel(), item.cut) if isinstance(item, FlatShard) else host


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + tensor.numel() * tensor.element_size()


def _arrival(apart: set[torch.device]) -> Callable[[], None]:
    marks = [streams.machine.mark(device) for device in apart]

    def wait() -> None:
        for mark in marks:
            mark.wait()

    return wait
