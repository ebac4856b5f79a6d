"""Flat buffers that are handed out and given back: allocated once, because fresh pages cost more than a copy.

Where states are offloaded they are page-aligned, so that a disk reads and writes them without a copy.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from distui.core.sharding.homes.home import flat_buffer


class BufferPool:
    """Free buffers by size, dtype and device.

    `take` never blocks: where no buffer of that kind is free a new one is made, so the pool is as large as the most
    that was ever in use at once. A new buffer is zero; one that was used before holds whatever it held.
    """

    def __init__(self, aligned: bool = False) -> None:
        self._aligned = aligned
        self._free: dict[tuple[Any, torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
        self.allocated_bytes = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device, kind: Any = None) -> torch.Tensor:
        """Return a flat buffer of `numel` elements; the caller owns it until `give` with the same `kind`.

        Buffers of one kind hold padding at the same places, so that it stays zero.
        """
        free = self._free[((numel, kind), dtype, device)]
        if free:
            return free.pop()
        buffer = flat_buffer(numel, dtype, device, self._aligned)
        self.allocated_bytes += buffer.numel() * buffer.element_size()
        return buffer

    def give(self, buffer: torch.Tensor, kind: Any = None) -> None:
        """Take `buffer` back; nothing may be in flight on it."""
        self._free[((buffer.numel(), kind), buffer.dtype, buffer.device)].append(buffer)

    def forget(self, buffer: torch.Tensor) -> None:
        """Leave `buffer` to whoever else holds it."""
        self.allocated_bytes -= buffer.numel() * buffer.element_size()
