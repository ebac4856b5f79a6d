"""The runs that this daemon keeps: where batches go in, and where watchers read from."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from distui.core.errors import UserError
from distui.core.paths import RunFolder, default_runs_dir
from distui.daemon.rank import HOST
from distui.daemon.runs import find_run, list_runs
from distui.daemon.state import DAEMON, RunState, replay
from distui.daemon.store import RunLog, read_batches, sync
from distui.proto import telemetry_pb2 as pb

_log = logging.getLogger("distui.daemon")
_KEEP_ENDED = 8
_STORE_HARDWARE_EVERY_S = 5.0
_SNAPSHOT_S = 0.1


@dataclass(slots=True)
class KeptRun:
    """A run in memory; `log` is open while batches come."""

    folder: RunFolder
    state: RunState
    log: RunLog | None = None
    log_error: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    own_seq: int = 0
    hardware_stored_s: float = 0.0
    snapshot: pb.Snapshot | None = None
    snapshot_s: float = 0.0

    def current(self) -> pb.Snapshot:
        """Return the snapshot, made anew at most every 0.1 s however many watch."""
        now_s = time.time()
        if self.snapshot is None or now_s - self.snapshot_s > _SNAPSHOT_S:
            self.snapshot, self.snapshot_s = self.state.snapshot(now_s), now_s
        return self.snapshot


class Runs:
    """All runs, by id."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, KeptRun] = OrderedDict()
        self._dirs: list[Path] = [default_runs_dir()]
        self._opening: dict[str, asyncio.Lock] = {}
        self._incarnation = time.time_ns()
        self._urgent = asyncio.Event()

    # ---- intake

    async def take(self, batch: pb.Batch) -> int:
        """Keep a batch on disk and in memory; return the sequence number up to which its source is kept.

        Raises: UserError where the run's folder is not there; OSError where the disk does not take it.
        """
        kept = await self._writable(batch)
        fresh = kept.state.unseen(batch)
        if len(fresh) < len(batch.records):
            del batch.records[: len(batch.records) - len(fresh)]
        if fresh:
            self._append(kept, batch)
        kept.state.apply(batch, heard_s=time.time())
        bodies = {record.WhichOneof("body") for record in batch.records}
        if bodies & {"event", "run_started", "run_finished", "rank_started", "rank_finished"}:
            self._urgent.set()
        if "run_finished" in bodies:
            self._refresh(kept, time.time())
        return kept.state.seen_seq(batch)

    def _append(self, kept: KeptRun, batch: pb.Batch) -> None:
        assert kept.log is not None
        try:
            kept.log.append(batch)
        except OSError as error:
            if not kept.log_error:
                _log.error("run %s: telemetry cannot be kept: %s", kept.folder.run_id, error)
                message = f"telemetry of this run is not kept, and ranks hold theirs back: {error}"
                event = pb.Event(level=pb.Event.ERROR, kind="disk_full", message=message)
                kept.state.events.append(pb.TimedEvent(time_s=time.time(), rank=DAEMON, event=event))
            kept.log_error = str(error)
            raise
        if kept.log_error:
            kept.log_error = ""
            self.note(kept, pb.Event(level=pb.Event.INFO, kind="disk_full", message="telemetry is kept again"))

    async def _writable(self, batch: pb.Batch) -> KeptRun:
        kept = self._kept.get(batch.run_id)
        if kept is not None and kept.log is not None:
            return kept
        async with self._opening.setdefault(batch.run_id, asyncio.Lock()):
            kept = self._kept.get(batch.run_id)
            if kept is not None and kept.log is not None:
                return kept
            folder = RunFolder(Path(batch.run_dir))
            if not folder.path.is_dir():
                raise UserError(
                    f"there is no folder {folder.path}", "the run's telemetry is kept there", "make it first"
                )
            log = RunLog(folder.telemetry)
            try:
                # Replayed also where the state is known: the log is what counts for what was taken before.
                state = await asyncio.to_thread(lambda: replay(folder, read_batches(folder)))
            except BaseException:
                log.close()
                raise
            kept = self._keep(KeptRun(folder, state, log))
            if folder.path.parent not in self._dirs:
                self._dirs.append(folder.path.parent)
            self._refresh(kept, time.time())
            return kept

    def note(self, kept: KeptRun, event: pb.Event) -> None:
        """Add an event of the daemon's own to the run, on disk too."""
        self._own(kept, pb.Record(time_s=time.time(), event=event))
        self._urgent.set()

    def _own(self, kept: KeptRun, record: pb.Record) -> None:
        kept.own_seq += 1
        record.seq = kept.own_seq
        source = pb.Source(rank=DAEMON, node=HOST, pid=os.getpid(), incarnation=self._incarnation)
        batch = pb.Batch(run_id=kept.folder.run_id, run_dir=str(kept.folder.path), source=source, records=[record])
        if kept.log is not None and not kept.log_error:
            try:
                self._append(kept, batch)
            except OSError:
                pass  # told by _append; it is still shown
        kept.state.apply(batch)

    def set_hardware(self, sample: pb.HardwareSample, now_s: float) -> None:
        """Give a sample of this node to every live run; one in five seconds is stored."""
        for kept in self.live():
            if now_s - kept.hardware_stored_s >= _STORE_HARDWARE_EVERY_S:
                kept.hardware_stored_s = now_s
                self._own(kept, pb.Record(time_s=now_s, hardware=sample))
            else:
                kept.state.set_hardware(HOST, sample, now_s)

    # ---- time

    def refresh(self) -> None:
        """Look after the live runs: dead processes, hangs, ends. Run it twice a second."""
        now_s = time.time()
        for kept in list(self._kept.values()):
            if kept.log is not None or not kept.state.is_final():
                self._refresh(kept, now_s)

    def _refresh(self, kept: KeptRun, now_s: float) -> None:
        state = kept.state
        known = {(found.kind, tuple(found.ranks)) for found in state.diagnosis}
        was_final = state.is_final() and kept.log is None
        state.refresh(now_s)
        for found in state.diagnosis:
            if not state.is_final() and (found.kind, tuple(found.ranks)) not in known:
                self.note(kept, pb.Event(level=pb.Event.ERROR, kind=found.kind, message=found.message))
        kept.snapshot = None
        kept.changed.set()
        kept.changed.clear()
        if state.is_final() and not was_final:
            self._close(kept)

    def _close(self, kept: KeptRun) -> None:
        """Store the last hardware sample, and let go of the log of a run that has ended."""
        node = kept.state.nodes.get(HOST)
        if kept.log is not None:
            if node is not None and node.HasField("hardware"):
                self._own(kept, pb.Record(time_s=node.last_seen_s, hardware=node.hardware))
            kept.log.close()
            kept.log = None

    async def sync(self) -> None:
        """Bring what was written to the disk: run it once a second; it is also cut short by `urgent`."""
        descriptors = [
            descriptor for kept in self._kept.values() if kept.log for descriptor in kept.log.take_unsynced()
        ]
        if descriptors:
            try:
                await asyncio.to_thread(sync, descriptors)
            except OSError as error:
                _log.error("fdatasync: %s", error)

    async def wait_urgent(self, timeout_s: float) -> None:
        """Wait until something came that should be on the disk at once, or the time is over."""
        try:
            await asyncio.wait_for(self._urgent.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass
        self._urgent.clear()

    def close(self) -> None:
        """Bring all to the disk and close every log."""
        for kept in self._kept.values():
            if kept.log is not None:
                kept.log.close()
                kept.log = None

    # ---- reading

    def live(self) -> list[KeptRun]:
        """Return the runs in memory that have not ended."""
        return [kept for kept in self._kept.values() if not kept.state.is_final()]

    def is_busy(self) -> bool:
        """Tell whether a run's launcher or ranks are alive."""
        return any(kept.state.is_alive() for kept in self.live())

    def __len__(self) -> int:
        return len(self._kept)

    def folders(self) -> list[RunFolder]:
        """Return every run known, newest first."""
        found: dict[str, RunFolder] = {}
        for folder in self._dirs:
            found.update({run.run_id: run for run in list_runs(folder)})
        return sorted(found.values(), key=lambda run: _began_s(run, self._kept.get(run.run_id)), reverse=True)

    async def find(self, run_id: str) -> KeptRun:
        """Return a run by id, a unique beginning of one, or a path; "" is the newest. Raises: UserError."""
        if run_id in self._kept:
            self._kept.move_to_end(run_id)
            return self._kept[run_id]
        return await self.load(self._locate(run_id))

    def _locate(self, run_id: str) -> RunFolder:
        if not run_id and (folders := self.folders()):
            return folders[0]
        for folder in self._dirs[1:]:
            try:
                return find_run(run_id, folder)
            except UserError:
                continue
        return find_run(run_id, self._dirs[0])

    async def load(self, folder: RunFolder) -> KeptRun:
        """Return the run in `folder`, read from disk where it is not in memory."""
        async with self._opening.setdefault(folder.run_id, asyncio.Lock()):
            kept = self._kept.get(folder.run_id)
            if kept is None:
                state = await asyncio.to_thread(lambda: replay(folder, read_batches(folder)))
                kept = self._keep(KeptRun(folder, state))
                self._refresh(kept, time.time())
            return kept

    def _keep(self, kept: KeptRun) -> KeptRun:
        before = self._kept.get(kept.folder.run_id)
        if before is not None:  # watchers hold the old one
            before.state, before.log, before.log_error, before.snapshot = kept.state, kept.log, "", None
            kept = before
        self._kept[kept.folder.run_id] = kept
        self._kept.move_to_end(kept.folder.run_id)
        ended = [name for name, other in self._kept.items() if other.log is None and other is not kept]
        ended = [name for name in ended if not self._kept[name].state.is_alive()]
        for name in ended[: max(0, len(ended) - _KEEP_ENDED)]:
            del self._kept[name]
            self._opening.pop(name, None)
        return kept


def _began_s(run: RunFolder, kept: KeptRun | None) -> float:
    try:
        return run.spec.stat().st_mtime
    except OSError:
        if kept is not None and kept.state.info.started_s:
            return kept.state.info.started_s
        try:
            return run.path.stat().st_mtime
        except OSError:
            return 0.0
