"""A run's telemetry on disk: an append-only log of batches in segments, one writer, any number of readers.

A segment is `00000001.log`: an 8-byte magic, then frames `[length u32][crc32 u32][zlib(serialized Batch)]`. Beside it
`00000001.idx` holds pairs `[arrival f64][offset u64]`, about one a second, so that a reader can begin in the middle.

What is promised: `append` returns when the frame is in the file (the kernel has it: a killed daemon loses nothing);
the daemon calls fdatasync each second and on events (so a power cut loses at most about a second). A torn tail is cut
when the writer opens the log, and ends the reading of a segment for a reader.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from distui.core.errors import DistuiError
from distui.core.paths import RunFolder
from distui.proto import telemetry_pb2 as pb

MAGIC = b"DISTUIT1"
SEGMENT_BYTES = 16 << 20
MAX_FRAME_BYTES = 64 << 20
"""No frame is longer: a larger length is damage."""

_FRAME = struct.Struct("<II")
_INDEX = struct.Struct("<dQ")
_INDEX_EVERY_S = 1.0


class StoreBusy(DistuiError):
    """Another process writes the log of this run."""


class RunLog:
    """The writer of one run's log; open it once."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open `folder` for appending and cut a torn tail. Raises: StoreBusy; OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._segment_bytes = folder, segment_bytes
        self._retired: list[int] = []
        self._dirty = False
        self._indexed_s = 0.0
        self._file = self._index = -1
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StoreBusy(f"another daemon writes {folder}") from error
        try:
            found = segments(folder)
            self._number = int(found[-1].stem) if found else 1
            self._open()
        except OSError:
            self.close()
            raise

    def append(self, batch: pb.Batch) -> None:
        """Write one batch; when it returns the batch is in the file. Raises: OSError, and then nothing was written."""
        payload = zlib.compress(batch.SerializeToString(), 1)
        if self._offset > len(MAGIC) and self._offset + _FRAME.size + len(payload) > self._segment_bytes:
            self._roll()
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            _write(self._file, frame)
        except OSError:
            os.ftruncate(self._file, self._offset)
            raise
        now = time.time()
        if now - self._indexed_s >= _INDEX_EVERY_S:
            self._indexed_s = now
            _write(self._index, _INDEX.pack(now, self._offset))
        self._offset += len(frame)
        self._dirty = True

    def take_unsynced(self) -> list[int]:
        """Return descriptors to hand to `sync`, in any thread; empty where all is on the disk."""
        found, self._retired = self._retired, []
        if self._dirty:
            found.append(os.dup(self._file))
            self._dirty = False
        return found

    def close(self) -> None:
        """Bring all to the disk and let another writer in."""
        if self._file >= 0:
            sync(self.take_unsynced())
            os.close(self._file)
        if self._index >= 0:
            os.close(self._index)
        self._file = self._index = -1
        os.close(self._lock)

    def _roll(self) -> None:
        retired = (self._file, self._index)
        self._number += 1
        try:
            self._open()
        except OSError:
            self._number -= 1
            self._file, self._index = retired
            raise
        self._retired.append(retired[0])
        os.close(retired[1])
        self._indexed_s = 0.0

    def _open(self) -> None:
        path = self._folder / f"{self._number:08}.log"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            end = _good_end(path)
            if end == 0:
                os.ftruncate(file, 0)
                _write(file, MAGIC)
                end = len(MAGIC)
            elif end < os.fstat(file).st_size:
                os.ftruncate(file, end)
            index = os.open(path.with_suffix(".idx"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            size = os.fstat(index).st_size
            os.ftruncate(index, size - size % _INDEX.size)
        except OSError:
            os.close(file)
            raise
        self._file, self._index, self._offset = file, index, end


def sync(descriptors: list[int]) -> None:
    """Bring what was written to the disk, and close the descriptors."""
    for descriptor in descriptors:
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def segments(folder: Path) -> list[Path]:
    """Return the segments of a log, oldest first."""
    return sorted(path for path in folder.glob("*.log") if path.stem.isdigit())


def read_batches(run: RunFolder, since: float = 0.0) -> Iterator[pb.Batch]:
    """Yield what is kept of a run, in order of arrival, also while it is written.

    With `since` (Unix seconds) what arrived before is left out, but for up to about a second.
    """
    found = segments(run.telemetry)
    starts = [_start(path, since) for path in found]
    for number, path in enumerate(found):
        if number + 1 < len(found) and starts[number + 1] is not None:
            continue  # the next segment began before `since`
        for _, payload in _frames(path, starts[number] or len(MAGIC)):
            yield pb.Batch.FromString(zlib.decompress(payload))


def _start(path: Path, since: float) -> int | None:
    """Return the offset from which frames arrived at `since` or later; None where all did."""
    if since <= 0:
        return None
    try:
        raw = path.with_suffix(".idx").read_bytes()
    except FileNotFoundError:
        return None
    start = None
    for arrival_s, offset in _INDEX.iter_unpack(raw[: len(raw) - len(raw) % _INDEX.size]):
        if arrival_s > since:
            break
        start = offset
    return start


def _good_end(path: Path) -> int:
    """Return the offset behind the last whole frame; 0 where not even the magic is whole."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return 0
    end = len(MAGIC)
    for end, _ in _frames(path, len(MAGIC)):
        pass
    return end


def _frames(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield each whole frame from `start` as the offset behind it and its payload."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return
        file.seek(start)
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            num_bytes, checksum = _FRAME.unpack(head)
            if num_bytes > MAX_FRAME_BYTES:
                return
            payload = file.read(num_bytes)
            if len(payload) < num_bytes or zlib.crc32(payload) != checksum:
                return
            start += _FRAME.size + num_bytes
            yield start, payload


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
