"""Builds `proto/telemetry.proto` records from what the ring and the ledger hold; on the side thread only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from distui.core.telemetry.collective import END_UNKNOWN, IS_ROOT
from distui.core.telemetry.cursor import LedgerCursor
from distui.core.telemetry.ledger import CollectiveEntry, LedgerReader
from distui.core.telemetry.ring import Ring, RingItem
from distui.proto import telemetry_pb2 as pb

MAX_TEXT_BYTES = 1 << 16
SETTLE_S = 0.05
"""A collective is sent this long after its end: the main thread may still say how long it waited for it."""

_LEVELS = {"info": pb.Event.INFO, "warning": pb.Event.WARNING, "error": pb.Event.ERROR}


class Collector:
    """Turns what has happened since the last call into numbered records. One thread uses it."""

    def __init__(self, ring: Ring, ledger: LedgerReader, log: Path | None = None) -> None:
        """Read from `ring` and `ledger`; `log` is where this rank's output goes."""
        self._ring, self._ledger, self._log = ring, ledger, log
        self._cursor = LedgerCursor(ledger)
        self._process = psutil.Process()
        self._peak_rss_bytes = 0
        self._seq = 0
        self._complained: set[str] = set()
        self.dropped = 0
        """Records lost before they were numbered: a full ring, an overrun ledger, or fields that cannot be sent."""

    def collect(self, *, rest: bool = False) -> list[pb.Record]:
        """Return the records of the collectives that finished and of what was put; `rest`: of unfinished ones too."""
        entries, lost = self._cursor.drain(time.time() - SETTLE_S, rest=rest)
        self._lose(lost)
        records = [self._number(_collective(entry)) for entry in entries]
        items, lost = self._ring.drain()
        self._lose(lost)
        for item in items:
            try:
                record = _BUILDERS[item.kind](item)
            except Exception as error:  # noqa: BLE001  fields are the caller's: any type, and a callable may raise anything
                self._lose(1)
                records.extend(self._complain(item, error))
            else:
                records.append(self._number(record))
        return records

    def heartbeat(self) -> pb.Record:
        """Return a sign of life with what the ledger says of the main thread."""
        state = self._ledger.state()
        beat = pb.Heartbeat(
            step=state.step,
            phase=state.phase,
            phase_since_s=state.phase_since_s,
            waiting_in=state.waiting_in(),
            waiting_since_s=state.waiting_since_s,
            last_seq=state.last_seq,
            log_bytes=self._log_bytes(),
        )
        return self._number(pb.Record(time_s=time.time(), heartbeat=beat))

    def _log_bytes(self) -> int | None:
        try:
            return self._log.stat().st_size if self._log is not None else None
        except OSError:
            return None  # not started by a launcher: its output goes elsewhere

    def memory(self) -> pb.Record:
        """Return what the engine said last of its memory, with the process's resident size."""
        said = self._ring.memory
        by_category, allocated, reserved, peak, total = said if said is not None else ({}, None, None, None, None)
        rss_bytes = self._process.memory_info().rss
        peak_rss_bytes, file_bytes = _kernel_counts()
        self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes, peak_rss_bytes)
        memory = pb.Memory(
            by_category_bytes=by_category,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            peak_allocated_bytes=peak,
            rss_bytes=rss_bytes,
            peak_rss_bytes=self._peak_rss_bytes,
            device_total_bytes=total,
            file_bytes=file_bytes,
        )
        return self._number(pb.Record(time_s=time.time(), memory=memory))

    def _number(self, record: pb.Record) -> pb.Record:
        self._seq += 1
        record.seq = self._seq
        return record

    def _lose(self, num_records: int) -> None:
        self.dropped += num_records
        self._seq += max(0, num_records)  # a gap in the numbers is what was dropped

    def _complain(self, item: RingItem, error: Exception) -> list[pb.Record]:
        message = f"a {item.kind} record cannot be sent: {type(error).__name__}: {error}"
        if item.kind in self._complained:
            return []
        self._complained.add(item.kind)
        event = pb.Event(level=pb.Event.WARNING, kind="telemetry", message=_cut(message))
        return [self._number(pb.Record(time_s=item.time_s, event=event))]


def _collective(entry: CollectiveEntry) -> pb.Record:
    collective = pb.Collective(
        group=entry.group,
        seq=entry.seq,
        op=entry.op,
        dtype=entry.dtype,
        bytes=entry.num_bytes,
        enqueued_s=entry.enqueued_s,
        started_s=entry.started_s,
        finished_s=None if entry.flags & END_UNKNOWN else entry.finished_s,
        group_size=entry.group_size,
        blocked_s=entry.blocked_s,
        is_root=bool(entry.flags & IS_ROOT),
    )
    return pb.Record(time_s=entry.finished_s or entry.enqueued_s, collective=collective)


def _rank_started(item: RingItem) -> pb.Record:
    world_size, local_rank, device, device_name, num_parameters, peak_flops, device_uuid, *chosen = item.fields
    own, strategy, layout = chosen
    started = pb.RankStarted(
        world_size=world_size,
        local_rank=local_rank,
        device=str(device),
        device_name=device_name,
        num_parameters=num_parameters,
        peak_flops=peak_flops,
        device_uuid=device_uuid,
        own_strategy=own,
        strategy=strategy,
        layout=pb.Layout(**layout) if layout else None,
    )
    return pb.Record(time_s=item.time_s, rank_started=started)


def _rank_finished(item: RingItem) -> pb.Record:
    exit_status, error = item.fields
    return pb.Record(time_s=item.time_s, rank_finished=pb.RankFinished(exit_status=exit_status, error=_cut(error)))


def _step(item: RingItem) -> pb.Record:
    fields = item.fields
    step = pb.Step(
        step=fields[0],
        step_s=fields[1],
        data_wait_s=fields[2],
        forward_s=fields[3],
        backward_s=fields[4],
        exposed_comm_s=fields[5],
        optimizer_s=fields[6],
        tokens=fields[7],
        samples=fields[8],
        loss=_number(fields[9]),
        grad_norm=_number(fields[10]),
        learning_rate=_number(fields[11]),
        loss_scale=_number(fields[12]),
        flops=_number(fields[13]),
        micro_batches=fields[14],
        skipped=bool(fields[15]),
        total_steps=fields[16],
    )
    return pb.Record(time_s=item.time_s, step=step)


def _event(item: RingItem) -> pb.Record:
    level, kind, message, attributes = item.fields
    event = pb.Event(
        level=_LEVELS[level.lower()],
        kind=kind,
        message=_cut(message),
        attributes={key: _cut(str(value)) for key, value in attributes.items()},
    )
    return pb.Record(time_s=item.time_s, event=event)


def _metrics(item: RingItem) -> pb.Record:
    step, values = item.fields
    numbers = {key: float(value() if callable(value) else value) for key, value in values.items()}
    return pb.Record(time_s=item.time_s, metrics=pb.Metrics(step=step, values=numbers))


_BUILDERS: dict[str, Callable[[RingItem], pb.Record]] = {
    "rank_started": _rank_started,
    "rank_finished": _rank_finished,
    "step": _step,
    "event": _event,
    "metrics": _metrics,
}


def _number(value: Any) -> float | None:
    if callable(value):
        value = value()
    return None if value is None else float(value)


def _cut(text: str) -> str:
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= MAX_TEXT_BYTES else raw[:MAX_TEXT_BYTES].decode(errors="ignore") + " ..."


def _kernel_counts() -> tuple[int, int | None]:
    """Return the high-water mark of this process's resident memory, and what of it now are pages of files.

    0 and None where the kernel keeps no such count.
    """
    if not sys.platform.startswith("linux"):
        return 0, None
    lines = (line.split() for line in Path("/proc/self/status").read_text(errors="replace").splitlines())
    counts = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("VmHWM:", "RssFile:")}
    return counts.get("VmHWM:", 0), counts.get("RssFile:")
