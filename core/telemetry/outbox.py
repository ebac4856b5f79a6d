"""What the daemon has not acknowledged yet: kept for the next stream, bounded, the oldest dropped and counted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distui.proto.telemetry_pb2 import Record

MAX_AGE_S = 60.0
MAX_BATCH_RECORDS = 512
MAX_BATCH_BYTES = 1 << 20


class Outbox:
    """Records on their way: `waiting` to be sent on this stream, or sent and `unacknowledged`."""

    def __init__(self, max_records: int, max_age_s: float = MAX_AGE_S) -> None:
        """Keep at most `max_records`, none longer than `max_age_s`; only the announcement of the rank is kept on."""
        self._max_records, self._max_age_s = max_records, max_age_s
        self._waiting: deque[tuple[float, Record]] = deque()
        self._sent: deque[tuple[float, Record]] = deque()
        self._announcements: list[Record] = []
        self._changed = threading.Condition()
        self.dropped = 0
        """Records given up because they were too old or too many."""

    def put(self, records: Sequence[Record]) -> None:
        """Append records with ascending sequence numbers."""
        now = time.monotonic()
        with self._changed:
            self._waiting.extend((now, record) for record in records)
            self._drop(now)
            self._changed.notify_all()

    def take(self, open_: Callable[[], bool]) -> list[Record]:
        """Wait for records and move them to the unacknowledged; [] once `open_` says no and `notify` was called."""
        with self._changed:
            while open_() and not self._waiting:
                self._changed.wait()
            batch: list[Record] = []
            num_bytes = 0
            while open_() and self._waiting and len(batch) < MAX_BATCH_RECORDS and num_bytes < MAX_BATCH_BYTES:
                entry = self._waiting.popleft()
                self._sent.append(entry)
                batch.append(entry[1])
                num_bytes += entry[1].ByteSize()
            return batch

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        with self._changed:
            while self._sent and self._sent[0][1].seq <= seq:
                self._sent.popleft()
            self._announcements = [record for record in self._announcements if record.seq > seq]
            self._changed.notify_all()

    def rewind(self) -> None:
        """Let what was sent without an answer wait again, for a new stream."""
        with self._changed:
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            now = time.monotonic()
            self._waiting.extendleft((now, record) for record in reversed(self._announcements))
            self._announcements = []

    def notify(self) -> None:
        """Wake who waits here, to look at its condition again."""
        with self._changed:
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float, open_: Callable[[], bool]) -> bool:
        """Wait until all is acknowledged, `open_` says no, or the time is over; return whether all is."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_kept() or not open_(), timeout_s)
            return not self._num_kept()

    def num_unacknowledged(self) -> int:
        """Return how many records are kept, sent or not."""
        with self._changed:
            return self._num_kept()

    def _num_kept(self) -> int:
        return len(self._waiting) + len(self._sent)

    def _drop(self, now: float) -> None:
        for queue in (self._sent, self._waiting):
            while queue and (self._num_kept() > self._max_records or now - queue[0][0] > self._max_age_s):
                record = queue.popleft()[1]
                if record.HasField("rank_started"):
                    self._announcements.append(record)
                else:
                    self.dropped += 1
