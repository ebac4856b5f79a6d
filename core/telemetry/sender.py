"""The side thread of a rank that sends its telemetry: batches, heartbeats, reconnects, and never holds up the job."""

from __future__ import annotations

import logging
import math
import os
import random
import socket as sockets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from distui.core.paths import RunFolder
from distui.core.telemetry.ledger import LedgerReader
from distui.core.telemetry.outbox import Outbox
from distui.core.telemetry.ring import Ring
from distui.core.telemetry.stacks import StackFile

if TYPE_CHECKING:
    from distui.core.config import TelemetrySection
    from distui.core.telemetry.records import Collector
    from distui.core.telemetry.stream import PublishStream
    from distui.proto import telemetry_pb2

CLOSE_S = 2.0
MEMORY_S = 1.0
STACK_S = 1.0
"""Where the main thread is gets noted so often, whatever pace the daemon asks for."""
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 2.0
PROBE_S = 0.5
MAX_PACE_S = 5.0
"""No daemon may ask for more: the ledger and the outbox hold what comes meanwhile."""
SPARE_RECORDS = 256

_log = logging.getLogger("distui.telemetry")


class Sender:
    """Drains a ring and a ledger into an outbox, and the outbox into the daemon, whenever there is one."""

    def __init__(
        self, ring: Ring, ledger: LedgerReader, run: RunFolder, socket: Path | None, settings: TelemetrySection
    ) -> None:
        """Take what to read and where to send; without a socket only the bounded ring is kept short."""
        self._ring, self._ledger, self._run, self._socket = ring, ledger, run, socket
        self._flush_s, self._heartbeat_s = settings.flush_s, settings.heartbeat_s
        self._outbox = Outbox(2 * settings.ring_size + SPARE_RECORDS)  # a full ring and a full ledger go in at once
        self._wake = threading.Event()
        self._close_by: float | None = None
        self._stream: PublishStream | None = None
        self._collector: Collector | None = None
        self._retry_s = FIRST_RETRY_S
        self._next_attempt = 0.0
        self._thread = threading.Thread(target=self._run_thread, name="distui-telemetry", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Send what there is now, not at the next flush."""
        self._wake.set()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Send the rest and end the thread, in `timeout_s` at most; return whether all was acknowledged."""
        self._close_by = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 0.5)
        return not self._thread.is_alive() and self._outbox.num_unacknowledged() == 0

    def dropped(self) -> int:
        """Return how many records were lost so far."""
        return self._outbox.dropped + (self._collector.dropped if self._collector else 0)

    def _run_thread(self) -> None:
        # Imported here: protobuf and psutil must not slow the start of the training thread.
        from distui.core.telemetry.records import Collector

        self._collector = collector = Collector(self._ring, self._ledger, self._run.rank_log(self._ledger.rank))
        stack = self._stack_file()
        next_beat = next_memory = 0.0
        next_stack = 0.0 if stack is not None else math.inf
        while self._close_by is None:
            now = time.monotonic()
            records = collector.collect()
            pace_s = min(MAX_PACE_S, self._stream.flush_s) if self._stream is not None else 0.0
            if now >= next_beat:
                records.append(collector.heartbeat())
                next_beat = now + _to_next(max(self._heartbeat_s, pace_s))
            if now >= next_memory:
                records.append(collector.memory())
                next_memory = now + _to_next(max(MEMORY_S, pace_s))
            if stack is not None and now >= next_stack:
                stack.write()
                next_stack = now + STACK_S
            self._outbox.put(records)
            self._connect()
            until = min(next_stack, next_beat, next_memory, now + _to_next(max(self._flush_s, pace_s)))
            if self._stream is None and self._socket is not None:
                until = min(until, self._next_attempt)
            self._wake.wait(max(0.0, until - time.monotonic()))
            self._wake.clear()
        self._outbox.put([collector.memory(), *collector.collect(rest=True)])
        self._finish(self._close_by)
        if stack is not None:
            stack.close()

    def _stack_file(self) -> StackFile | None:
        try:
            return StackFile(self._run, self._ledger.rank)
        except OSError as error:  # a full disk: the ledger has told of it
            _log.debug("where the main thread is will not be known from outside: %s", error)
            return None

    def _finish(self, deadline: float) -> None:
        """Wait until all is acknowledged; at once where nobody listens, else until `deadline`."""
        self._next_attempt = 0.0
        self._connect()
        while (left := deadline - time.monotonic()) > 0:
            if (stream := self._stream) is None:
                if self._socket is None or not _answers(self._socket):
                    return
                self._wake.clear()
                self._wake.wait(min(left, max(0.0, self._next_attempt - time.monotonic())))
            elif self._outbox.wait_empty(left, stream.is_open):
                stream.close(max(0.0, deadline - time.monotonic()))
                return
            self._connect()
        if self._stream is not None:
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
