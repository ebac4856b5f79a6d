"""Host memory in whole pages: for disks that pass by the page cache, and locked for the copies of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from typing import Any

import torch

from distui.core.ranks import streams

PAGE_BYTES = 4096
"""What O_DIRECT demands of offsets, lengths and addresses on every disk in use."""

HUGE_PAGE_BYTES = 2 << 20
"""From here on memory is asked for in huge pages: a disk then moves it in pieces of 2 MiB, not of 4 KiB, and reaches
1.8 times the rate when it reads and writes at once (measured with four threads on a virtual disk)."""


def page_buffer(nbytes: int, pinned: bool = False) -> torch.Tensor:
    """Return host memory of at least `nbytes`, zero, page-aligned and a whole number of pages (uint8).

    `pinned` memory is locked for copies of a GPU, in these pages and no more: torch's own pinned allocator takes the
    next power of two, and keeps it. A child that is forked does not have it.
    """
    rounded = max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES
    # Anonymous memory goes back to the system when the tensor is freed, and fresh pages are zero.
    memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if rounded >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, nothing else
            memory.madvise(mmap.MADV_HUGEPAGE)
    if not pinned:
        return _tensor_on(memory)
    if hasattr(mmap, "MADV_DONTFORK"):
        # Else the parent's next write would move its page away from under the device.
        memory.madvise(mmap.MADV_DONTFORK)
    # What is weakly referred to tells before it is freed; the mapping itself would tell afterwards.
    held: Any = (ctypes.c_ubyte * rounded).from_buffer(memory)
    unpin = streams.machine.pin(ctypes.addressof(held), rounded)
    weakref.finalize(held, unpin).atexit = False
    return _tensor_on(held)


def _tensor_on(memory: Any) -> torch.Tensor:
    # It may be asked for while a script evaluates in inference mode, and is written to in training then.
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)
