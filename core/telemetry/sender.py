"""The side thread of a rank that sends its telemetry: batches, heartbeats, reconnects, and never holds up the job."""

from __future__ import annotations

import logging
import os
import random
import socket as sockets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from distui.core.paths import RunFolder
from distui.core.telemetry.ledger import LedgerReader
from distui.core.telemetry.outbox import Outbox
from distui.core.telemetry.ring import Ring
from distui.core.telemetry.spool import Spool
from distui.core.telemetry.stacks import StackFile

if TYPE_CHECKING:
    from distui.core.config.schema import TelemetrySection
    from distui.core.telemetry.records import Collector
    from distui.core.telemetry.stream import PublishStream
    from distui.proto import telemetry_pb2

IDLE_S = 2.0
"""At the end of the rank a daemon that acknowledges nothing for so long gets no more: the rest goes to the disk."""
CLOSE_S = 10.0
"""And so does what is left after so long, however the daemon gets on."""
END_S = 60.0
"""The rank waits so long for the thread, which needs no daemon to end: only a disk that hangs takes so long."""
SPILL_S = 2.0
"""Without a daemon for so long, what is not acknowledged goes to the disk, and on from there."""
MEMORY_S = 1.0
STACK_S = 1.0
"""Where the main thread is gets noted so often, whatever pace the daemon asks for."""
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 0.5
PROBE_S = 0.5
MAX_PACE_S = 5.0
"""No daemon may ask for more: the ledger and the outbox hold what comes meanwhile."""
SPARE_RECORDS = 256

T = TypeVar("T")

_log = logging.getLogger("distui.telemetry")


class Sender:
    """Drains a ring and a ledger into an outbox, and the outbox into the daemon, whenever there is one."""

    def __init__(
        self, ring: Ring, ledger: LedgerReader, run: RunFolder, socket: Path | None, settings: TelemetrySection
    ) -> None:
        """Take what to read and where to send; without a socket all goes to the disk."""
        self._ring, self._ledger, self._run, self._socket = ring, ledger, run, socket
        self._flush_s, self._heartbeat_s = settings.flush_s, settings.heartbeat_s
        spool = Spool(run.unsent(ledger.rank, ledger.incarnation), self._batch)
        # A full ring and a full ledger go in at once.
        self._outbox = Outbox(2 * settings.ring_size + SPARE_RECORDS, spool)
        self._wake = threading.Event()
        self._closing = False
        self._alone_s = time.monotonic()
        self._stream: PublishStream | None = None
        self._collector: Collector | None = None
        self._stack: StackFile | None = None
        self._next_beat = self._next_memory = self._next_stack = 0.0
        self._complained = False
        self._retry_s = FIRST_RETRY_S
        self._next_attempt = 0.0
        self._thread = threading.Thread(target=self._run_thread, name="distui-telemetry", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Send what there is now, not at the next flush."""
        self._wake.set()

    def close(self) -> int:
        """Send the rest, or put on the disk what the daemon does not take, and end the thread.

        Returns: how many records are neither with the daemon nor on the disk.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(END_S)
        return self._outbox.num_in_memory() + len(self._ring)

    def dropped(self) -> int:
        """Return how many records were lost so far."""
        return self._outbox.dropped + (self._collector.dropped if self._collector else 0)

    def _run_thread(self) -> None:
        try:
            # Imported here: protobuf and psutil must not slow the start of the training thread.
            from distui.core.telemetry.records import Collector

            self._collector = Collector(self._ring, self._ledger, self._run.rank_log(self._ledger.rank))
            self._stack = self._stack_file()
            while not self._closing:
                until = self._safely(self._turn, time.monotonic() + self._flush_s)
                self._wake.wait(max(0.0, until - time.monotonic()))
                self._wake.clear()
            self._safely(self._end, None)
        except (ImportError, MemoryError, OSError) as error:
            self._complain(error)
        self._outbox.spill()

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        """Do work of which a part may fail where the process is out of memory, threads or files, and go on."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  whatever it is, the next turn may do better, and the end still writes
            self._complain(error)
            return otherwise

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("telemetry is held up: %s: %s", type(error).__name__, error)

    def _turn(self) -> float:
        """Collect and send what is due; return when the next turn is."""
        assert self._collector is not None
        now = time.monotonic()
        records = self._collector.collect()
        pace_s = min(MAX_PACE_S, self._stream.flush_s) if self._stream is not None else 0.0
        if now >= self._next_beat:
            records.append(self._collector.heartbeat())
            self._next_beat = now + _to_next(max(self._heartbeat_s, pace_s))
        if now >= self._next_memory:
            records.append(self._collector.memory())
            self._next_memory = now + _to_next(max(MEMORY_S, pace_s))
        if self._stack is not None and now >= self._next_stack:
            self._stack.write()
            self._next_stack = now + STACK_S
        self._outbox.put(records)
        self._connect()
        if self._stream is not None:
            self._alone_s = time.monotonic()
        elif time.monotonic() - self._alone_s > SPILL_S:
            self._outbox.spill()
        until = min(self._next_beat, self._next_memory, now + _to_next(max(self._flush_s, pace_s)))
        if self._stack is not None:
            until = min(until, self._next_stack)
        if self._stream is None and self._socket is not None:
            until = min(until, self._next_attempt)
        return until

    def _end(self) -> None:
        assert self._collector is not None
        self._outbox.put([self._collector.memory(), *self._collector.collect(rest=True)], rest=True)
        self._finish()

    def _stack_file(self) -> StackFile | None:
        try:
            return StackFile(self._run, self._ledger.rank)
        except OSError as error:  # a full disk: the ledger has told of it
            _log.debug("where the main thread is will not be known from outside: %s", error)
            return None

    def _finish(self) -> None:
        """Have a daemon take the rest as long as it gets on with it, and put on the disk what it does not take."""
        self._next_attempt = 0.0
        self._connect()
        now = time.monotonic()
        end, idle_by = now + CLOSE_S, now + IDLE_S
        left = self._outbox.num_unacknowledged()
        while left and (wait_s := min(end, idle_by) - time.monotonic()) > 0:
            if (stream := self._stream) is not None:
                before, left = left, self._outbox.wait_fewer(left, wait_s, stream.is_open)
                if left < before:
                    idle_by = time.monotonic() + IDLE_S
            elif self._socket is None or not _answers(self._socket):
                break
            else:
                self._wake.clear()
                self._wake.wait(min(wait_s, max(0.0, self._next_attempt - time.monotonic())))
            self._connect()
        if self._stream is not None and not left:
            self._stream.close(IDLE_S)
        elif self._stream is not None:
            self._stream.cancel()

    def _connect(self) -> None:
        """Start a stream where there is none, a daemon answers, and it is time to try."""
        stream, now = self._stream, time.monotonic()
        if stream is not None:
            if stream.is_open():
                if stream.acknowledged:
                    self._retry_s = FIRST_RETRY_S
                return
            stream.cancel()
            self._stream = None
            self._postpone(now)
        if self._socket is None or now < self._next_attempt:
            return
        if not _answers(self._socket):
            self._postpone(now)
            return
        from distui.core.telemetry.stream import PublishStream

        self._outbox.rewind()
        try:
            self._stream = PublishStream(self._socket, self._outbox, self._batch, self._wake.set)
        except RuntimeError:  # no thread can be started while the interpreter shuts down
            self._postpone(now)

    def _postpone(self, now: float) -> None:
        self._next_attempt = now + self._retry_s * random.uniform(0.5, 1.0)
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def _batch(self, records: list[telemetry_pb2.Record]) -> telemetry_pb2.Batch:
        from distui.proto import telemetry_pb2 as pb

        source = pb.Source(
            rank=self._ledger.rank,
            node=sockets.gethostname(),
            pid=os.getpid(),
            incarnation=self._ledger.incarnation,
        )
        return pb.Batch(
            run_id=self._run.run_id,
            run_dir=str(self._run.path.absolute()),
            source=source,
            records=records,
            dropped=self.dropped(),
            last=self._outbox.at_end(),
        )


def _to_next(period_s: float) -> float:
    """Return the seconds to the next multiple of a period on the clock.

    All ranks of a node send at once then: the daemon wakes once for them, and they are late in the same collective.
    """
    return period_s - time.time() % period_s


def _answers(socket: Path) -> bool:
    """Tell whether somebody listens; costs nothing beside what gRPC would spend to find out."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(os.fspath(socket))
        except OSError:
            return False
    return True
