"""Where a rank's main thread is, readable from outside: while it hangs, holds the interpreter, is stopped, or is dead.

Two files of each rank in the run's ledger folder. `rank<R>.stack` is mapped: a side thread writes the main thread's
stack into it with every heartbeat, so it is the present one as long as any other thread can run, and the last known
one after. `rank<R>.trace` takes what `faulthandler` writes when `SIGNAL` comes: from a signal handler, so also while
C code holds the interpreter's lock. The signal goes to the side thread, so that it interrupts no call of the script's.
A process that is stopped handles no signal: there the last known one has to do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from distui.core.paths import RunFolder, open_own, read_own
from distui.core.telemetry.mapped_file import map_new, publish

SIGNAL = signal.SIGRTMIN + 7
"""Has the process write its stacks. No library that we know of uses it, unlike SIGUSR1 and SIGUSR2."""
SIZE_BYTES = 8192
MAX_FRAMES = 40
MAX_TRACE_BYTES = 1 << 20
TRACE_S = 1.0
"""Time that a process gets to handle the signal."""

_HEAD = struct.Struct("@ddIIQ")  # when, since when, length, crc32 of the text, thread that writes it
_log = logging.getLogger("distui.telemetry")


class KnownStack(NamedTuple):
    """A main thread's stack, innermost frame first: `file:line function`. `time_s`: when it was
    there last; `since_s`: since when it has been the same."""

    time_s: float
    since_s: float
    frames: tuple[str, ...]
    writer: int = 0
    """The native id of the side thread that notes it."""


class StackFile:
    """Keeps the main thread's stack in the run's folder. `write` is for one side thread."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        """Make both files. Raises: OSError where they cannot be made."""
        path = stack_path(run, rank)
        self._buffer: mmap.mmap = map_new(path, SIZE_BYTES)
        publish(path)
        self._text, self._since_s = b"", 0.0
        self._main = threading.main_thread().ident
        _handle_signal(open_own(trace_path(run, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    def write(self) -> None:
        """Note where the main thread is now."""
        frame = sys._current_frames().get(self._main) if self._main is not None else None
        text = "\n".join(_frames(frame)).encode()[: SIZE_BYTES - _HEAD.size]
        now_s = time.time()
        if text != self._text:
            self._text, self._since_s = text, now_s
            self._buffer[_HEAD.size : _HEAD.size + len(text)] = text
        writer = threading.get_native_id()
        _HEAD.pack_into(self._buffer, 0, now_s, self._since_s, len(text), zlib.crc32(text), writer)


_trace = -1
"""The descriptor that the signal handler of this process writes to."""


def _handle_signal(trace: int) -> None:
    """Write stacks to `trace` when the signal comes, as long as the process lives: unhandled, it would end it."""
    global _trace
    try:
        faulthandler.register(SIGNAL, file=trace, all_threads=True)
    except (AttributeError, ValueError, RuntimeError) as error:
        _log.debug("no stacks while the interpreter's lock is held: %s", error)
    if _trace >= 0:
        os.close(_trace)
    _trace = trace


def stack_path(run: RunFolder, rank: int) -> Path:
    """Return the file with the last known stack of a rank."""
    return run.ledger / f"rank{rank}.stack"


def trace_path(run: RunFolder, rank: int) -> Path:
    """Return the file that a rank's signal handler appends to."""
    return run.ledger / f"rank{rank}.trace"


def known_stack(run: RunFolder, rank: int) -> KnownStack | None:
    """Return where a rank's main thread was last seen; None where that is not kept, or was cut off half-written."""
    try:
        raw = read_own(stack_path(run, rank), SIZE_BYTES)
    except OSError:
        return None
    if len(raw) < _HEAD.size:
        return None
    time_s, since_s, length, check, writer = _HEAD.unpack_from(raw, 0)
    text = raw[_HEAD.size : _HEAD.size + length]
    if not length or zlib.crc32(text) != check:
        return None
    return KnownStack(time_s, since_s, tuple(text.decode(errors="replace").split("\n")), writer)


def traced(run: RunFolder, rank: int, pid: int, timeout_s: float = TRACE_S) -> str:
    """Have a process write its stacks from a signal handler, and return them; "" where it does not."""
    known = known_stack(run, rank)
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if known is None or tgkill is None or not _handles(pid):
        return ""
    try:
        with open(open_own(trace_path(run, rank)), "rb") as file:
            before = file.seek(0, os.SEEK_END)
            if tgkill(pid, known.writer, SIGNAL):
                return ""
            deadline = time.monotonic() + timeout_s
            text = ""
            while time.monotonic() < deadline:
                file.seek(before)
                longer = file.read(MAX_TRACE_BYTES).decode(errors="replace")
                if longer and longer == text:
                    return text
                text = longer
                time.sleep(0.02)  # a file tells nobody that it has grown
    except OSError:
        return ""
    return ""


def trace_frames(text: str) -> tuple[str, ...]:
    """Return the main thread's frames from what faulthandler wrote: it is the last one it lists."""
    part = text.rpartition("(most recent call first):")[2]
    frames: list[str] = []
    for line in part.splitlines():
        file, found, rest = line.strip().removeprefix('File "').partition('", line ')
        number, _, function = rest.partition(" in ")
        if found:
            frames.append(f"{file}:{number} {function}")
    return tuple(frames)


def _frames(frame: FrameType | None) -> list[str]:
    found: list[str] = []
    while frame is not None and len(found) < MAX_FRAMES:
        code = frame.f_code
        found.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found


def _handles(pid: int) -> bool:
    """Tell whether a process has a handler for the signal: without one it would end."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    except OSError:
        return False
    return False
