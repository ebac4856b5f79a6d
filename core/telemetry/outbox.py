"""What the daemon has not acknowledged yet: kept for the next stream, in memory and then on the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distui.core.telemetry.spool import Spool
    from distui.proto.telemetry_pb2 import Record

MAX_BATCH_RECORDS = 512
MAX_BATCH_BYTES = 1 << 20


class Outbox:
    """Records on their way: `waiting` to be sent on this stream, or sent and `unacknowledged`.

    The oldest are in the spool, where there is one; then come those that were sent, then those that wait.
    """

    def __init__(self, max_records: int, spool: Spool | None = None) -> None:
        """Keep at most `max_records` in memory and the older ones in `spool`.

        Where that takes no more, the oldest in memory are dropped and counted, but for the rank's announcement.
        """
        self._max_records, self._spool = max_records, spool
        self._waiting: deque[Record] = deque()
        self._sent: deque[Record] = deque()
        self._announcements: list[Record] = []
        self._changed = threading.Condition()
        self._complete = False
        self.dropped = 0
        """Records given up because they were too many."""

    def put(self, records: Sequence[Record], *, rest: bool = False) -> None:
        """Append records with ascending sequence numbers; after the `rest` nothing more comes."""
        with self._changed:
            self._complete = rest
            self._waiting.extend(records)
            if self._num_in_memory() > self._max_records:
                self._spill()
            self._drop()
            self._changed.notify_all()

    def take(self, open_: Callable[[], bool]) -> list[Record]:
        """Wait for records and move them to the unacknowledged; [] once `open_` says no and `notify` was called."""
        with self._changed:
            while open_() and not self._waiting and not (self._spool and self._spool.num_waiting()):
                self._changed.wait()
            if not open_():
                return []
            if self._spool and (older := self._spool.take()):
                return older
            batch = _first_batch(self._waiting)
            for record in batch:
                self._sent.append(record)
                self._waiting.popleft()
            return batch

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        with self._changed:
            while self._sent and self._sent[0].seq <= seq:
                self._sent.popleft()
            self._announcements = [record for record in self._announcements if record.seq > seq]
            if self._spool:
                self._spool.acknowledge(seq)
            self._changed.notify_all()

    def rewind(self) -> None:
        """Let what was sent without an answer wait again, for a new stream."""
        with self._changed:
            if self._spool:
                self._spool.rewind()
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            self._waiting.extendleft(reversed(self._announcements))
            self._announcements = []

    def spill(self) -> None:
        """Move all that is in memory to the disk."""
        with self._changed:
            self._spill()

    def notify(self) -> None:
        """Wake who waits here, to look at its condition again."""
        with self._changed:
            self._changed.notify_all()

    def wait_fewer(self, num_records: int, timeout_s: float, open_: Callable[[], bool]) -> int:
        """Wait until fewer than `num_records` are unacknowledged, `open_` says no, or the time is over; return them."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_kept() < num_records or not open_(), timeout_s)
            return self._num_kept()

    def num_unacknowledged(self) -> int:
        """Return how many records are kept, sent or not."""
        with self._changed:
            return self._num_kept()

    def num_in_memory(self) -> int:
        """Return how many records are neither acknowledged nor on the disk."""
        with self._changed:
            return self._num_in_memory()

    def at_end(self) -> bool:
        """Tell whether what was taken last is the last of all."""
        with self._changed:
            return self._complete and not self._waiting and not (self._spool and self._spool.num_waiting())

    def _num_in_memory(self) -> int:
        return len(self._waiting) + len(self._sent)

    def _num_kept(self) -> int:
        return self._num_in_memory() + (self._spool.num_records() if self._spool else 0)

    def _spill(self) -> None:
        if not self._spool:
            return
        for queue, sent in ((self._sent, True), (self._waiting, False)):
            while batch := _first_batch(queue):
                for _ in batch:
                    queue.popleft()
                last = self._complete and not self._num_in_memory()
                if not self._spool.append(batch, sent=sent, rest=self._complete, last=last):
                    queue.extendleft(reversed(batch))
                    return

    def _drop(self) -> None:
        for queue in (self._sent, self._waiting):
            while queue and self._num_in_memory() > self._max_records:
                record = queue.popleft()
                if record.HasField("rank_started"):
                    self._announcements.append(record)
                else:
                    self.dropped += 1


def _first_batch(queue: deque[Record]) -> list[Record]:
    batch: list[Record] = []
    num_bytes = 0
    for record in queue:
        batch.append(record)
        num_bytes += record.ByteSize()
        if len(batch) >= MAX_BATCH_RECORDS or num_bytes >= MAX_BATCH_BYTES:
            break
    return batch
