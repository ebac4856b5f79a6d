"""What the engine tells of itself, from the training thread, at a cost of microseconds.

    training thread ── step, event ... ──> Ring ──────┐
                    └─ collectives, phase ─> Ledger ──┤ (memory-mapped file, also read by the daemon)
                                                      └─> Sender (side thread) ── gRPC ──> daemon
    daemon ── ZeroMQ ──> ControlListener (side thread) ──> handlers

Importing this loads neither grpc, protobuf nor zmq: the side threads do, when they need them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distui.core.errors import UserError
from distui.core.paths import RunFolder, control_socket, daemon_socket
from distui.core.telemetry.control import ControlListener, Handler
from distui.core.telemetry.ledger import FINISH_IS_SEEN, Ledger, LedgerReader
from distui.core.telemetry.ring import Ring
from distui.core.telemetry.sender import Sender

if TYPE_CHECKING:
    from distui.core.config.schema import TelemetrySection

Number = float | Callable[[], float | None] | None
"""A value, or what gives it on the side thread (so that reading a loss does not wait for the device), or not known."""

_log = logging.getLogger("distui.telemetry")


class TelemetrySource:
    """What one rank sends. Made by `open_source`; once closed, and in a forked child, it does nothing any more."""

    __slots__ = (
        "__weakref__",
        "_collectives",
        "_control",
        "_key",
        "_ledger",
        "_num_opened",
        "_phase",
        "_place",
        "_ring",
        "_sender",
        "last_step",
        "total_steps",
    )

    _collectives: bool
    _control: ControlListener | None
    _key: tuple[Path, int]
    _ledger: Ledger
    _num_opened: int
    _phase: str
    _place: tuple[int, int]  # world size, local rank
    _ring: Ring
    _sender: Sender
    last_step: int
    total_steps: int
    """How many steps the training will have; 0 where nobody has said."""

    @property
    def active(self) -> bool:
        """Whether anything is recorded; where not, the caller may skip taking times."""
        return True

    def rank_started(
        self,
        device: str,
        device_name: str,
        num_parameters: int,
        peak_flops: float | None = None,
        own_strategy: bool = False,
        strategy: str = "",
        layout: dict[str, int | str] | None = None,
    ) -> None:
        """Say that the engine is up, or that the script trains without one: then `own_strategy`.

        `peak_flops`: of the device, per second, where known. `strategy`: the engine's, in words, which a script may
        have chosen otherwise than the job's settings. `layout`: the fields of the message of that name.
        """
        own = own_strategy, strategy, layout
        fields = (*self._place, device, device_name, num_parameters, peak_flops, _uuid_of(device), *own)
        self._ring.put("rank_started", fields)
        self._sender.wake()

    def step(
        self,
        *,
        step: int,
        step_s: float,
        data_wait_s: float = 0.0,
        forward_s: float = 0.0,
        backward_s: float = 0.0,
        exposed_comm_s: float = 0.0,
        optimizer_s: float = 0.0,
        tokens: int = 0,
        samples: int = 0,
        loss: Number = None,
        grad_norm: Number = None,
        learning_rate: float | None = None,
        loss_scale: float | None = None,
        flops: float | None = None,
        micro_batches: int = 1,
        skipped: bool = False,
    ) -> None:
        """Say that an optimizer step is done. The fields are those of the message `Step`; steps count from 1."""
        fields = (
            step,
            step_s,
            data_wait_s,
            forward_s,
            backward_s,
            exposed_comm_s,
            optimizer_s,
            tokens,
            samples,
            loss,
            grad_norm,
            learning_rate,
            loss_scale,
            flops,
            micro_batches,
            skipped,
            self.total_steps,
        )
        self._ring.put("step", fields)
        self.last_step = step
        self._ledger.set_step(step)

    def memory(
        self,
        by_category_bytes: Mapping[str, int],
        allocated_bytes: int | None = None,
        reserved_bytes: int | None = None,
        peak_allocated_bytes: int | None = None,
        device_total_bytes: int | None = None,
    ) -> None:
        """Say what the memory holds; the newest is sent once a second, with the resident size of the process."""
        self._ring.memory = (
            dict(by_category_bytes),
            allocated_bytes,
            reserved_bytes,
            peak_allocated_bytes,
            device_total_bytes,
        )

    def phase(self, name: str) -> str:
        """Say what the main thread does from now on (setup, data, ... idle); return what it did before."""
        before, self._phase = self._phase, name
        self._ledger.set_phase(name)
        return before

    def collective_begin(self, group: str, op: str, dtype: str, nbytes: int, group_size: int, flags: int = 0) -> int:
        """Record a collective as enqueued now; return its token. `flags`: of `distui.core.telemetry.ledger`."""
        return self._ledger.begin(group, op, dtype, nbytes, group_size, flags) if self._collectives else 0

    def collective_started(self, token: int, started_s: float) -> None:
        """Say when the collective began to run, where the backend tells."""
        if token:
            self._ledger.started(token, started_s)

    def collective_end(self, token: int, finished_s: float | None = None) -> None:
        """Say that the collective has finished, now or at `finished_s`. From any thread."""
        if token:
            self._ledger.end(token, finished_s)

    def collective_seen(self, token: int) -> None:
        """Say that the collective's end will be noted when it happens, whoever waits."""
        if token:
            self._ledger.set_flags(token, FINISH_IS_SEEN)

    def collective_waited(self, token: int, seconds: float) -> None:
        """Say that a wait of so long for the collective is over; it ends now, unless its end was noted before."""
        if token:
            self._ledger.waited(token, seconds)

    def blocked(self, token: int, seconds: float) -> None:
        """Add to how long the main thread waited for the collective; at the latest right after its end."""
        if token:
            self._ledger.blocked(token, seconds)

    def waiting(self, token: int | None) -> None:
        """Say in which collective the main thread is blocked from now on; None: in none."""
        self._ledger.waiting(token)

    def event(self, level: str, kind: str, message: str, **attributes: object) -> None:
        """Send at once that something happened. `level`: info, warning or error."""
        self._ring.put("event", (level, kind, message, attributes))
        self._sender.wake()

    def metrics(self, step: int, values: Mapping[str, Number]) -> None:
        """Send what the script logs."""
        self._ring.put("metrics", (step, dict(values)))

    def on_control(self, verb: str, handler: Handler) -> None:
        """Let `handler` answer the control verb; see `distui.core.telemetry.control` for what it gets and returns."""
        if self._control is not None:
            self._control.on(verb, handler)

    def close(self, exit_status: int, error: str = "") -> None:
        """Say that the rank ends, send the rest or put it on the disk, and stop; never raises.

        Where several engines opened the source, the last one to close it ends it, or the first that failed.
        """
        self._num_opened -= 1
        if self._num_opened <= 0 or exit_status != 0:
            self._ring.put("rank_finished", (exit_status, error))
            self._ledger.ended(exit_status, error)
            self._stop()

    def _stop(self) -> None:
        sender, control = self._sender, self._control
        self.__class__ = NullSource
        _live.discard(self)
        if lost := sender.close():
            self._ledger.lost(lost)
            _log.debug("%d records could neither be sent nor written", lost)
        if control is not None:
            control.close(timeout_s=0.5)


class NullSource(TelemetrySource):
    """A source that records nothing, so that callers need no `if`."""

    __slots__ = ()

    def __init__(self) -> None:
        self.last_step = self.total_steps = 0

    @property
    def active(self) -> bool:
        """False."""
        return False

    def rank_started(self, *args: Any, **fields: Any) -> None:
        """Do nothing."""

    def step(self, **fields: Any) -> None:
        """Do nothing."""

    def memory(self, *args: Any, **fields: Any) -> None:
        """Do nothing."""

    def phase(self, name: str) -> str:
        """Return no phase."""
        return ""

    def collective_begin(self, group: str, op: str, dtype: str, nbytes: int, group_size: int, flags: int = 0) -> int:
        """Return 0, the token of no collective."""
        return 0

    def collective_started(self, token: int, started_s: float) -> None:
        """Do nothing."""

    def collective_end(self, token: int, finished_s: float | None = None) -> None:
        """Do nothing."""

    def collective_seen(self, token: int) -> None:
        """Do nothing."""

    def collective_waited(self, token: int, seconds: float) -> None:
        """Do nothing."""

    def blocked(self, token: int, seconds: float) -> None:
        """Do nothing."""

    def waiting(self, token: int | None) -> None:
        """Do nothing."""

    def event(self, level: str, kind: str, message: str, **attributes: object) -> None:
        """Do nothing."""

    def metrics(self, step: int, values: Mapping[str, Number]) -> None:
        """Do nothing."""

    def on_control(self, verb: str, handler: Handler) -> None:
        """Do nothing."""

    def close(self, exit_status: int, error: str = "") -> None:
        """Do nothing."""


_lock = threading.Lock()
_live: set[TelemetrySource] = set()
_current: TelemetrySource | None = None
_hooked = False


def open_source(
    rank: int, local_rank: int, world_size: int, run: RunFolder | None, settings: TelemetrySection
) -> TelemetrySource:
    """Start the telemetry of this rank and make it the process's own.

    The same rank of the same run gets the same source again, for a second engine. Without a run, or where
    `telemetry.enabled` is false, it is a `NullSource`.
    """
    global _current
    with _lock:
        if run is None or not settings.enabled:
            _current = NullSource()
            return _current
        key = (run.path.absolute(), rank)
        for source in _live:
            if source._key == key:
                source._num_opened += 1
                _current = source
                return source
        _hook()
        _current = _start(rank, local_rank, world_size, run, settings)
        _live.add(_current)
        return _current


def current() -> TelemetrySource | None:
    """Return the source that was opened last in this process; None before the first."""
    return _current


def _start(rank: int, local_rank: int, world_size: int, run: RunFolder, settings: TelemetrySection) -> TelemetrySource:
    began, problem = time.time_ns(), ""
    try:
        ledger = Ledger(
            run.rank_ledger(rank),
            rank=rank,
            world_size=world_size,
            capacity=settings.ring_size,
            incarnation=began,
        )
    except OSError as error:
        # Telemetry must not end a job: a full disk costs the post-mortem, not the training.
        problem = f"the collective ledger cannot be kept in {run.rank_ledger(rank)}: {error}"
        _log.warning("%s; it is kept in memory only", problem)
        ledger = Ledger(None, rank=rank, world_size=world_size, capacity=settings.ring_size, incarnation=began)
    sockets: tuple[Path, Path] | None = None
    try:
        sockets = daemon_socket(), control_socket()
    except UserError as error:
        _log.warning("no telemetry is sent: %s", error)
    source = TelemetrySource()
    source._collectives, source._key, source._num_opened = settings.collectives, (run.path.absolute(), rank), 1
    source._place, source.last_step, source.total_steps = (world_size, local_rank), 0, 0
    source._ledger, source._ring = ledger, Ring(settings.ring_size)
    reader = LedgerReader(ledger.buffer)
    source._sender = Sender(source._ring, reader, run, sockets[0] if sockets else None, settings)
    source._control = ControlListener(run.run_id, rank, sockets[1]) if sockets else None
    source._phase = "setup"
    ledger.set_phase("setup")
    source._sender.start()
    if source._control is not None:
        source._control.start()
    if problem:
        source.event("warning", "telemetry", problem)
    return source


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_silence_child)
        atexit.register(_flush_all)


def _silence_child() -> None:
    """Turn every source into a null one: a forked child has no side threads, and must not write the parent's ledger."""
    global _lock
    _lock = threading.Lock()
    for source in _live:
        source.__class__ = NullSource
        _inherited.append(source)
    _live.clear()


_inherited: list[TelemetrySource] = []
"""Keeps the parent's channel and sockets from being torn down in a forked child."""


def _flush_all() -> None:
    """Send the rest of what nobody closed. How the rank ends is not known here, so nothing is said of it."""
    for source in list(_live):
        source._stop()


def _uuid_of(device: str) -> str:
    """Return by what NVML knows a GPU, whichever are visible here; "" for other devices."""
    if not device.startswith("cuda"):
        return ""
    properties = sys.modules["torch"].cuda.get_device_properties(device)  # who has such a device has imported it
    return str(getattr(properties, "uuid", ""))
