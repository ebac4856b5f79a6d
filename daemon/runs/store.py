"""A run's telemetry on disk: an append-only log in segments, that any crash leaves readable.

One frame a batch: `[u32 length][u32 crc32][zlib(Batch)]`, little-endian, length and checksum those of the compressed
bytes. Files are `00000001.log`, `00000002.log`, ... in `RunFolder.telemetry`; a new one begins at about 16 MiB. What a
crash cut off at the end is dropped by the next writer and passed over by readers.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distui.core.errors import NotOwn
from distui.core.paths import RunFolder, list_own, open_own, own_folder
from distui.daemon.runs.batches import Malformed, unpack
from distui.proto import telemetry_pb2 as pb

SEGMENT_BYTES = 16 << 20
MAX_FRAME_BYTES = 64 << 20
_FRAME = struct.Struct("<II")
_NAME = re.compile(r"[0-9]{8}\.log")
_LEVEL = 1


class RunLog:
    """The writer of one run's log. There is one a run: the daemon of the node."""

    def __init__(self, run: RunFolder, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log for appending, made if need be; a torn tail is cut off. Raises: OSError."""
        self._folder, self._segment_bytes = run.telemetry, segment_bytes
        self._folder.mkdir(mode=0o700, exist_ok=True)
        names = _numbers(self._folder)
        self._number = names[-1] if names else 0
        try:
            self._descriptor = self._open(os.O_RDWR)
            self._size = 0
            for end, _ in frames(self._descriptor):
                self._size = end
            os.ftruncate(self._descriptor, self._size)
        except (FileNotFoundError, NotOwn):  # there is none yet, or it is not ours alone to change: begin another
            self._number += 1
            self._descriptor, self._size = self._open(os.O_WRONLY | os.O_CREAT | os.O_EXCL), 0
        self._dirty = False
        self._syncing = threading.Lock()  # the disk is waited for on another thread than that which appends

    def append(self, batch: pb.Batch) -> None:
        """Write one batch: from here on it outlives this process. Raises: OSError, with nothing of it written."""
        body = zlib.compress(batch.SerializeToString(), _LEVEL)
        if self._size >= self._segment_bytes:
            self._next_segment()
        frame = memoryview(_FRAME.pack(len(body), zlib.crc32(body)) + body)
        try:
            while frame:
                frame = frame[os.write(self._descriptor, frame) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += _FRAME.size + len(body)
        self._dirty = True

    def flush(self) -> None:
        """Have the disk keep what was appended: from here on it outlives the machine. Raises: OSError."""
        with self._syncing:
            if self._dirty:
                self._dirty = False
                os.fdatasync(self._descriptor)

    @property
    def dirty(self) -> bool:
        """Whether there is anything to flush."""
        return self._dirty

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.flush()
        finally:
            with self._syncing:
                self._dirty = False
                os.close(self._descriptor)

    def abandon(self) -> None:
        """Close the file without waiting for the disk."""
        with self._syncing:
            self._dirty = False
            os.close(self._descriptor)

    def _next_segment(self) -> None:
        self.flush()
        number, descriptor = self._number, self._descriptor
        self._number += 1
        with self._syncing:
            try:
                self._descriptor = self._open(os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except OSError:
                self._number = number
                raise
            os.close(descriptor)
            self._size = 0

    def _open(self, flags: int) -> int:
        return open_own(_segment(self._folder, self._number), flags | os.O_APPEND)


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.log"


def _numbers(folder: Path) -> list[int]:
    """Return the numbers that are taken by whatever has a segment's name."""
    with own_folder(folder) as descriptor:
        return sorted(int(name[:-4]) for name in os.listdir(descriptor) if _NAME.fullmatch(name))


def segment_files(run: RunFolder) -> dict[Path, os.stat_result]:
    """Return the files of the run's log, oldest first; none where there are none of this user's own.

    Raises: NotOwn; OSError.
    """
    found = list_own(run.telemetry)
    return {run.telemetry / name: found[name] for name in sorted(found) if _NAME.fullmatch(name)}


def read_batches(run: RunFolder) -> Iterator[pb.Batch]:
    """Yield what the run's log holds, in the order of arrival, also while it is being written.

    A file is read up to its first bad frame: what follows one cannot be told from noise.
    """
    for segment in segment_files(run):
        yield from (batch for _, batch in _batches(segment))


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two frames of a log."""

    segment: int = 0
    offset: int = 0


def read_batch(run: RunFolder, position: Position) -> pb.Batch:
    """Return the batch that lies at a position. Raises: OSError, or EOFError where there is no whole one."""
    for _, batch in _batches(_segment(run.telemetry, position.segment), position.offset):
        return batch
    raise EOFError(f"no batch at {position}")


class LogTail:
    """Reads a log as it grows, from a position on."""

    def __init__(self, run: RunFolder, start: Position) -> None:
        """Begin behind `start`."""
        self._run, self._at = run, start

    def read(self, max_batches: int = 64) -> list[tuple[Position, pb.Batch]]:
        """Return the next whole batches, each with the place behind it; empty where there is nothing more yet."""
        found: list[tuple[Position, pb.Batch]] = []
        for segment in segment_files(self._run):
            number = int(segment.stem)
            if number < self._at.segment:
                continue
            offset = self._at.offset if number == self._at.segment else 0
            for end, batch in _batches(segment, offset):
                self._at = Position(number, end)
                found.append((self._at, batch))
                if len(found) >= max_batches:
                    return found
        return found


def _batches(segment: Path, start: int = 0) -> Iterator[tuple[int, pb.Batch]]:
    """Yield where each batch from offset `start` on ends, and the batch, up to the first that is none."""
    try:
        descriptor = open_own(segment)
    except FileNotFoundError:
        return  # deleted since it was listed: it was too old
    try:
        for end, body in frames(descriptor, start):
            yield end, unpack(body)
    except Malformed:
        return
    finally:
        os.close(descriptor)


def frames(descriptor: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield where each whole frame from offset `start` on ends, and its compressed bytes."""
    with open(descriptor, "rb", closefd=False) as file:
        end = start
        file.seek(start)
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            if not 0 < length <= MAX_FRAME_BYTES:  # zeros are what a crash of the machine, or a sparse file, leaves
                return
            body = file.read(length)
            if len(body) < length or zlib.crc32(body) != checksum:
                return
            end += _FRAME.size + length
            yield end, body
