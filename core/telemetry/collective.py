"""What a ledger tells of one collective, and of the rank that keeps it."""

from __future__ import annotations

from typing import NamedTuple

from distui.core.errors import DistuiError

FINISH_IS_SEEN = 1
"""Flag of a collective whose end is noted when it happens, not only when somebody waits for it."""
SIDE_THREAD = 2
"""Flag of a collective that a side thread of the script entered (a checkpoint's, say): no training step needs it."""

END_UNKNOWN = 4
"""Flag of a collective that had ended by the time somebody waited for it, nobody knows when."""

IS_ROOT = 8
"""Flag of a collective that this rank is the source of (broadcast, scatter), or the destination (gather, reduce)."""


class LedgerUnreadable(DistuiError):
    """The file is no ledger, of another version, or cut short."""


class CollectiveEntry(NamedTuple):
    """One collective of one rank. `started_s` and `finished_s` are None where not known or not yet."""

    token: int
    group: str
    seq: int
    op: str
    dtype: str
    num_bytes: int
    group_size: int
    enqueued_s: float
    started_s: float | None
    finished_s: float | None
    blocked_s: float
    flags: int = 0

    def text(self) -> str:
        """Return `all_reduce data_parallel#17`."""
        return f"{self.op} {self.group}#{self.seq}"


class LedgerState(NamedTuple):
    """What a rank is doing. `waiting` is the collective that its main thread is blocked in."""

    rank: int
    world_size: int
    pid: int
    incarnation: int
    step: int
    phase: str
    phase_since_s: float
    waiting: CollectiveEntry | None
    waiting_since_s: float
    last_seq: dict[str, int]
    ended_s: float | None
    exit_status: int
    error: str
    """What it ended of, where it failed; cut short."""
    lost: int
    """Records that it could neither send nor write at its end."""

    def waiting_in(self) -> str:
        """Return the collective that the main thread is blocked in, as text; "" where there is none."""
        return self.waiting.text() if self.waiting else ""
