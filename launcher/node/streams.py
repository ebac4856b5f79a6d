"""A rank's stdout and stderr: both in one log, in order, and which parts of it are stderr.

The launcher copies the first rank's log to its own two streams. What Python writes to stderr is noted in a file of
marks beside the log, a line before each write and one after it; what C code or children write there goes as stdout.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

from distui.core.paths import open_own

BEGUN = b"begun\n"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def marks_of(log: Path) -> Path:
    """Return the file of marks of a log."""
    return log.with_suffix(".stderr")


def redirect(log: Path, *, marked: bool) -> None:
    """Let stdout and stderr of this process, C++ code and children included, go to one file in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        # Opened twice: the place in the file after a write to stderr is then stderr's own.
        target = open_own(log, _APPEND)
        os.dup2(target, stream)
        os.close(target)
    if marked:
        raw = MarkedStderr(open_own(marks_of(log), _APPEND))
        sys.stderr = io.TextIOWrapper(
            raw,  # as `python -u` has it: no buffer
            encoding=sys.stderr.encoding,
            errors="backslashreplace",
            line_buffering=True,
            write_through=True,
        )


class MarkedStderr(io.RawIOBase):
    """File descriptor 2, and marks of what was written to it."""

    name = "<stderr>"

    def __init__(self, marks: int) -> None:
        super().__init__()
        self._marks, self._lock = marks, threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return 2."""
        return 2

    def isatty(self) -> bool:
        """Return that it is a file."""
        return False

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        with self._lock:
            os.write(self._marks, BEGUN)
            begin = None
            while left:
                num_written = os.write(2, left)
                end = os.lseek(2, 0, os.SEEK_CUR)
                begin = end - num_written if begin is None else begin
                left = left[num_written:]
            os.write(self._marks, f"{begin or 0} {end if size else 0}\n".encode())
        return size


class Marks:
    """The marks as a reader has them: which parts of the log are stderr."""

    def __init__(self, log: Path) -> None:
        self._path, self._parts, self._rest = marks_of(log), list[tuple[int, int]](), b""
        self._file: io.BufferedReader | None = None
        self._num_open = 0

    def read(self) -> bool:
        """Take what is new; return whether everything that has begun is also written."""
        if self._file is None:
            try:
                self._file = open(open_own(self._path), "rb")  # noqa: SIM115  kept open: read on from where it was
            except OSError:
                return True  # this log has none
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            if line + b"\n" == BEGUN:
                self._num_open += 1
                continue
            begin, _, end = line.partition(b" ")
            if begin.isdigit() and end.isdigit():
                self._num_open = max(0, self._num_open - 1)
                self._parts.append((int(begin), int(end)))
        return not self._num_open

    def cut(self, data: bytes, start: int) -> list[tuple[bool, bytes]]:
        """Return the pieces of what the log has from `start` on, each with whether it is stderr."""
        pieces, at, stop = list[tuple[bool, bytes]](), start, start + len(data)
        for begin, end in sorted(self._parts):
            begin, end = max(begin, at), min(end, stop)
            if begin >= end:
                continue
            if begin > at:
                pieces.append((False, data[at - start : begin - start]))
            pieces.append((True, data[begin - start : end - start]))
            at = end
        if at < stop:
            pieces.append((False, data[at - start :]))
        self._parts = [part for part in self._parts if part[1] > stop]
        return pieces

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
