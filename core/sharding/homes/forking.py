"""No fork while a disk reads straight into memory.

A fork makes the pages of both processes common until one of them writes. Past the page cache the disk writes without
the processor's knowledge: where the parent was the first to touch such a page, it went on with a copy, and the rest
of the read arrived in the child's. Loader workers are forked in the middle of training, so a fork waits for the reads
that are under way. What begins afterwards takes pages of its own first, and what is only written to disk is not moved.
"""

from __future__ import annotations

import os
import threading
from collections import deque

LONGEST_S = 300.0
"""A disk that answers no more must not keep a process from forking what may tell of it."""

_reads: deque[threading.Event] = deque()


def note_read(over: threading.Event) -> None:
    """Take into account a read that has begun, and sets `over`."""
    while _reads and _reads[0].is_set():
        _reads.popleft()
    _reads.append(over)


def _finish_reads() -> None:
    for over in list(_reads):
        over.wait(LONGEST_S)


os.register_at_fork(before=_finish_reads)
