"""Rank 0's stdin, where it is the launcher's: while the script waits at it, telemetry says so."""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distui.core.telemetry.kinds import INPUT
from distui.launcher.job.console import ConsoleLine

if TYPE_CHECKING:
    from distui.core.telemetry.source import TelemetrySource

_TOLD_S = 0.5
"""A shorter wait holds up nobody."""


class PersonWait:
    """Says that the main thread waits for a person, and when that is over for how long it did."""

    def __init__(self, source: TelemetrySource | None) -> None:
        self._source = source

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Be in a phase of `FOR_A_PERSON`; one within another is the inner one for so long."""
        source = self._source
        if source is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before, began_s = source.phase(phase), time.time()
        try:
            yield
        finally:
            source.phase(before)
            ended_s = time.time()
            if ended_s - began_s >= _TOLD_S:
                message = f"waited {ended_s - began_s:.0f} s for a person ({phase})"
                source.event("info", phase, message, began_s=began_s, ended_s=ended_s)


class NotedStdin(io.RawIOBase):
    """File descriptor 0. Whoever reads from a terminal first has the output so far shown."""

    name = "<stdin>"

    def __init__(self, waits: PersonWait, line: ConsoleLine) -> None:
        self._waits, self._line = waits, line

    def fileno(self) -> int:
        """Return 0."""
        return 0

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(0)

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is; wait where there is nothing yet."""
        ready = select.poll()
        ready.register(0, select.POLLIN)
        if ready.poll(0) and not os.isatty(0):
            return self._read(buffer)
        with self._waits(INPUT):
            if os.isatty(0):
                self._line.wait_shown()
            return self._read(buffer)

    @staticmethod
    def _read(buffer: Any) -> int:
        data = os.read(0, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def note_stdin(waits: PersonWait, line: ConsoleLine) -> None:
    """Have what Python reads from stdin noted."""
    if sys.stdin is None:
        return
    buffered = io.BufferedReader(NotedStdin(waits, line))
    sys.stdin = io.TextIOWrapper(buffered, encoding=sys.stdin.encoding, errors=sys.stdin.errors)
