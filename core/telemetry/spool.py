"""What no daemon has taken yet, on the rank's own disk: sent first when one comes, else read with the run's log.

A file of the same frames as that log (`daemon/runs/store.py`), each one batch. It is bounded; what does not fit stays
in memory, so a run without a daemon keeps its beginning and its end.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from distui.proto.telemetry_pb2 import Batch, Record

MAX_BYTES = 64 << 20
LEVEL = 1
_FRAME = struct.Struct("<II")  # length, crc32 of what follows: zlib(Batch)


class _Kept(NamedTuple):
    offset: int
    num_bytes: int
    num_records: int
    last_seq: int


class Spool:
    """One file of one source. Not for several threads at once; the outbox sees to that."""

    def __init__(self, path: Path, batch: Callable[[list[Record]], Batch], max_bytes: int = MAX_BYTES) -> None:
        """Keep at most `max_bytes` at `path`, which is made when it is needed; `batch` says whose the records are."""
        self._path, self._batch, self._max_bytes = path, batch, max_bytes
        self._descriptor = -1
        self._size = self._num_sent = 0
        self._frames: deque[_Kept] = deque()
        self._broken = False

    def append(self, records: list[Record], *, sent: bool, rest: bool, last: bool) -> bool:
        """Write records behind those that are kept; False where they do not fit, or the disk does not take them.

        `sent`: they are on their way already; `rest`: the source is ending, and the bound does not hold any more;
        `last`: nothing follows them.
        """
        if self._broken or (self._size >= self._max_bytes and not rest):
            return False
        batch = self._batch(records)
        batch.last = last
        body = zlib.compress(batch.SerializeToString(), LEVEL)
        frame = memoryview(_FRAME.pack(len(body), zlib.crc32(body)) + body)
        try:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
            written = 0
            while written < len(frame):
                written += os.pwrite(self._descriptor, frame[written:], self._size + written)
        except OSError:  # the disk is full, or no folder is there: memory has to do
            self._broken = True
            return False
        self._frames.append(_Kept(self._size, len(frame), len(records), records[-1].seq))
        self._size += len(frame)
        self._num_sent += sent
        return True

    def take(self) -> list[Record]:
        """Return the next records that were not sent on this stream; [] where there are none."""
        if self._num_sent >= len(self._frames):
            return []
        from distui.proto.telemetry_pb2 import Batch

        kept = self._frames[self._num_sent]
        self._num_sent += 1
        body = os.pread(self._descriptor, kept.num_bytes, kept.offset)[_FRAME.size :]
        return list(Batch.FromString(zlib.decompress(body)).records)

    def rewind(self) -> None:
        """Have all that is kept sent again."""
        self._num_sent = 0

    def acknowledge(self, seq: int) -> None:
        """Forget what a daemon has taken; an empty spool leaves no file."""
        if not self._frames or self._frames[0].last_seq > seq:
            return
        while self._frames and self._frames[0].last_seq <= seq:
            self._frames.popleft()
            self._num_sent = max(0, self._num_sent - 1)
        if not self._frames:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor, self._size = -1, 0

    def num_waiting(self) -> int:
        """Return how many batches were not sent on this stream."""
        return len(self._frames) - self._num_sent

    def num_records(self) -> int:
        """Return how many records are kept."""
        return sum(kept.num_records for kept in self._frames)
