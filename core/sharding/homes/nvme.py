"""A home on NVMe: one file a rank and model, read and written past the page cache by a few threads.

The file has no name: it goes with the process, however that ends. Its space is claimed before training starts, so a
disk that is too small is told of at once. Where the file system refuses O_DIRECT, the page cache is used, with a
warning. Any failure of the disk reaches the training thread as a UserError when it waits for the data.
"""

from __future__ import annotations

import errno
import os
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from distui.core.errors import UserError
from distui.core.ranks import streams
from distui.core.ranks.host_memory import PAGE_BYTES, page_buffer
from distui.core.sharding.homes import forking
from distui.core.sharding.homes.home import Cell, Home, Sequel, Transfer
from distui.core.sharding.units.layout import round_up

NUM_THREADS = 4
"""A local NVMe disk gives its full rate with about four requests of 1 MiB in flight."""

CHUNK_BYTES = 1 << 20

SLOW_S = 10.0
"""A wait this long is told of."""

STALLED_S = 300.0
"""A wait this long ends the job: the disk does not answer any more."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)

Chunk = tuple[bool, memoryview, int, "_FileTransfer"]
"""Whether to write, what, at which offset, and for whom."""


class _FileTransfer(Transfer):
    """Chunks on their way between a buffer and the file."""

    def __init__(self, file: SwapFile, write: bool, nbytes: int, num_chunks: int) -> None:
        self._file, self._write, self._nbytes = file, write, nbytes
        self._left = num_chunks
        self._lock = threading.Lock()
        self.over = threading.Event()
        self._error: OSError | None = None

    def end_chunk(self, error: OSError | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if not self._left:
                self.over.set()

    def wait(self) -> None:
        """Block until all chunks are through.

        Raises: UserError where the disk failed or does not answer.
        """
        if not self.over.is_set():
            self._file.wait_for(self.over, self._write, self._nbytes)
        if self._error is not None:
            raise self._file.failure(self._write, self._nbytes, self._error)


def move_chunk(handle: int, write: bool, view: memoryview, offset: int) -> None:
    """Read or write all of `view`, however many calls it takes.

    Raises: OSError.
    """
    while view.nbytes:
        done = os.pwritev(handle, [view], offset) if write else os.preadv(handle, [view], offset)
        if done <= 0:
            raise OSError(errno.EIO, f"the file ends at {offset}, {view.nbytes} bytes early")
        view, offset = view[done:], offset + done


def _serve(chunks: queue.SimpleQueue[Chunk | None], handle: int) -> None:
    while (chunk := chunks.get()) is not None:
        write, view, offset, transfer = chunk
        error = None
        try:
            move_chunk(handle, write, view, offset)
        except OSError as problem:
            error = problem
        view.release()
        transfer.end_chunk(error)
        del view, transfer, chunk


def _close(chunks: queue.SimpleQueue[Chunk | None], threads: list[threading.Thread], handle: int) -> None:
    for _ in threads:
        chunks.put(None)
    for thread in threads:
        thread.join(SLOW_S)
    if not any(thread.is_alive() for thread in threads):
        os.close(handle)


def _allocate(handle: int, offset: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(handle, offset, nbytes)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        os.ftruncate(handle, offset + nbytes)  # room cannot be claimed ahead here: the writes tell when there is none


def _open_unnamed(folder: Path, flags: int) -> int:
    try:
        return os.open(folder, flags | os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    # No unnamed files here (or no O_DIRECT, which the next line tells): a named one that loses its name at once.
    handle, name = tempfile.mkstemp(prefix=".distui-offload-", dir=folder)
    try:
        if not flags:
            return handle
        os.close(handle)
        return os.open(name, flags | os.O_RDWR)
    finally:
        os.unlink(name)


class SwapFile:
    """The file, its threads, and what was moved."""

    def __init__(self, folder: str, on_warning: Callable[[str], None]) -> None:
        """Open a file in `folder`.

        Raises: UserError where it cannot be written.
        """
        self.folder = Path(folder).expanduser()
        self._on_warning = on_warning
        self.size = 0
        self.bytes_read = self.bytes_written = 0
        self.waited_s = 0.0
        """Seconds that the training thread was blocked on the disk."""
        self._told_slow = False
        self._wanted_bytes = 0
        try:
            self.handle, self.is_direct = self._open()
        except OSError as error:
            raise UserError(
                f"offload.nvme_path {self.folder} cannot be used",
                str(error),
                "set offload.nvme_path to a folder on a local NVMe disk that you may write",
            ) from error
        self._chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        # Daemon threads: a disk that does not answer must not keep the process from ending.
        arguments = (self._chunks, self.handle)
        self._threads = [
            threading.Thread(target=_serve, args=arguments, name=f"distui-nvme-{index}", daemon=True)
            for index in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _close, self._chunks, self._threads, self.handle)
        self._finalizer.atexit = False

    def _open(self) -> tuple[int, bool]:
        page = page_buffer(PAGE_BYTES)
        why = "the platform has no O_DIRECT"
        if _DIRECT:
            try:
                handle = _open_unnamed(self.folder, _DIRECT)
                try:
                    # Some file systems take the flag and refuse the write, or ask for larger blocks.
                    move_chunk(handle, True, page.numpy().data, 0)
                except OSError:
                    os.close(handle)
                    raise
                return handle, True
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                why = str(error)
        handle = _open_unnamed(self.folder, 0)
        move_chunk(handle, True, page.numpy().data, 0)
        self._on_warning(
            f"{self.folder} refuses O_DIRECT ({why}): offloaded states go through the page cache, which takes host "
            "memory and time; a local disk with ext4 or xfs does not"
        )
        return handle, False

    def expect(self, nbytes: int, why: str) -> None:
        """Refuse a disk that has no room for `nbytes` more, before any is claimed.

        Raises: UserError in numbers.
        """
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise UserError(
                f"offload.nvme_path {self.folder} has too little room",
                f"{why} needs {nbytes:,} bytes there, {free:,} are free",
                "free some space, choose another offload.nvme_path, or use more ranks on other nodes",
            )

    def claim(self, nbytes: int) -> int:
        """Claim so many bytes of the disk, in whole pages; return their offset.

        Raises: UserError where there is no room.
        """
        offset, rounded = self.size, round_up(nbytes, PAGE_BYTES)
        try:
            _allocate(self.handle, offset, rounded)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise UserError(
                f"offload.nvme_path {self.folder} has too little room",
                f"{error.strerror}: {offset + rounded:,} bytes are needed up to here for this rank, {offset:,} are "
                f"claimed, {free:,} are free on the disk",
                "free some space, raise the file size limit (ulimit -f), or choose another offload.nvme_path",
            ) from error
        self.size += rounded
        return offset

    def submit(self, write: bool, buffer: torch.Tensor, offset: int) -> Transfer:
        """Start to read or write `buffer` (uint8, page-aligned, whole pages) at `offset`."""
        view = buffer.numpy().data
        nbytes = view.nbytes
        starts = range(0, nbytes, CHUNK_BYTES)
        transfer = _FileTransfer(self, write, nbytes, len(starts))
        for start in starts:
            self._chunks.put((write, view[start : start + CHUNK_BYTES], offset + start, transfer))
        if write:
            self.bytes_written += nbytes
        else:
            forking.note_read(transfer.over)
            self.bytes_read += nbytes
        return transfer

    def wait_for(self, over: threading.Event, write: bool, nbytes: int) -> None:
        """Block until `over`; tell of a slow disk, and give up on one that does not answer.

        Raises: UserError.
        """
        started = time.perf_counter()
        doing = "writing" if write else "reading"
        if not over.wait(min(SLOW_S, STALLED_S)):
            if not self._told_slow:
                self._told_slow = True
                self._on_warning(
                    f"the disk at {self.folder} is slow: {doing} {nbytes:,} bytes has taken {SLOW_S:.0f} s so far"
                )
            if not over.wait(STALLED_S - SLOW_S):
                raise UserError(
                    f"the disk at {self.folder} does not answer",
                    f"{doing} {nbytes:,} bytes of offloaded states has taken {STALLED_S:.0f} s",
                    "look into the kernel's log (dmesg); go on from the last checkpoint with another offload.nvme_path",
                )
        self.waited_s += time.perf_counter() - started

    def failure(self, write: bool, nbytes: int, error: OSError) -> UserError:
        """Return what is told when the disk failed."""
        doing = "writing" if write else "reading"
        fix = "go on from the last checkpoint with another offload.nvme_path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = f"free some space there, or {fix}"
        else:
            fix = f"look into the kernel's log (dmesg) and the disk's health (smartctl); {fix}"
        return UserError(
            f"the disk at {self.folder} failed under offloaded states",
            f"{doing} {nbytes:,} bytes: {error}; this rank holds {self.size:,} bytes there",
            fix,
        )


class NvmeCell(Cell):
    """A tensor that rests in the file."""

    def __init__(self, home: NvmeHome, numel: int, dtype: torch.dtype) -> None:
        super().__init__(numel, dtype)
        self._home = home
        self._offset = home.file.claim(self.nbytes)
        self._storing: Transfer | None = None

    def settle(self) -> None:
        """Block until what is being stored is there: it would be read torn, or overwritten by what is older."""
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.wait()

    def fetch(self, out: torch.Tensor) -> Transfer:
        """Start to read the tensor into `out`, straight where that is page-aligned host memory."""
        self.settle()
        pages = as_pages(out)
        if pages is not None:
            return self._home.file.submit(False, pages, self._offset)
        staging = self._home.take_staging(self.nbytes)

        def arrive() -> None:
            out.copy_(staging[: self.nbytes].view(self.dtype))
            self._home.give_staging(staging)

        return Sequel(self._home.file.submit(False, staging, self._offset), arrive)

    def store(self, source: torch.Tensor) -> Transfer:
        """Start to write `source`, straight where that is page-aligned host memory."""
        self.settle()
        pages = as_pages(source)
        if pages is not None:
            self._storing = self._home.file.submit(True, pages, self._offset)
            return self._storing
        staging = self._home.take_staging(self.nbytes)
        staging[: self.nbytes].view(self.dtype).copy_(source)
        writing = self._home.file.submit(True, staging, self._offset)
        self._storing = Sequel(writing, lambda: self._home.give_staging(staging))
        return self._storing

    def _pages_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the first byte of the pages around the elements [start, end), and their number of bytes."""
        first = start * self.dtype.itemsize // PAGE_BYTES * PAGE_BYTES
        return first, round_up(end * self.dtype.itemsize, PAGE_BYTES) - first

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return the elements [start, end)."""
        self.settle()
        if start == end:
            return torch.empty(0, dtype=self.dtype)
        first, nbytes = self._pages_of(start, end)
        pages = page_buffer(nbytes)
        self._home.file.submit(False, pages, self._offset + first).wait()
        at = start * self.dtype.itemsize - first
        return pages[at : at + (end - start) * self.dtype.itemsize].view(self.dtype)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on by `values`; the rest of their pages stays."""
        self.settle()
        if not values.numel():
            return
        first, nbytes = self._pages_of(start, start + values.numel())
        at, length = start * self.dtype.itemsize - first, values.numel() * self.dtype.itemsize
        pages = page_buffer(nbytes)
        if length < nbytes:
            self._home.file.submit(False, pages, self._offset + first).wait()
        pages[at : at + length].view(self.dtype).copy_(values)
        self._home.file.submit(True, pages, self._offset + first).wait()


def as_pages(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the whole pages that a flat tensor lies in, as bytes; None where it does not own whole pages."""
    nbytes = tensor.numel() * tensor.element_size()
    aligned = tensor.data_ptr() % PAGE_BYTES == 0 and nbytes % PAGE_BYTES == 0
    if tensor.device.type != "cpu" or streams.machine.holds(tensor) or not aligned or not tensor.is_contiguous():
        return None
    return tensor.detach().view(torch.uint8)


class NvmeHome(Home):
    """Cells in one file."""

    name = "nvme"

    def __init__(self, folder: str, on_warning: Callable[[str], None], pinned: bool) -> None:
        self.file = SwapFile(folder, on_warning)
        self._pinned = pinned
        self._staging: dict[int, list[torch.Tensor]] = {}
        self.staging_bytes = 0

    def cell(self, numel: int, dtype: torch.dtype) -> Cell:
        """Claim room in the file."""
        return NvmeCell(self, numel, dtype)

    @property
    def held_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.size

    def take_staging(self, nbytes: int) -> torch.Tensor:
        """Return a page-aligned buffer for data on its way to memory that the disk cannot reach."""
        rounded = round_up(nbytes, PAGE_BYTES)
        free = self._staging.setdefault(rounded, [])
        if free:
            return free.pop()
        self.staging_bytes += rounded
        return page_buffer(rounded, self._pinned)

    def give_staging(self, buffer: torch.Tensor) -> None:
        """Take a staging buffer back."""
        self._staging[buffer.numel()].append(buffer)
