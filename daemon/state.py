"""A run as its batches tell it. The same code reads a live stream and a log on disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from distui.core.paths import RunFolder
from distui.daemon import process
from distui.daemon.collectives import CollectiveTable
from distui.daemon.diagnosis import diagnose
from distui.daemon.history import StepHistory
from distui.daemon.rank import HOST, RankView
from distui.daemon.runs import read_json
from distui.proto import telemetry_pb2 as pb

LAUNCHER = -1
DAEMON = -2
FINAL_STATES = frozenset({"finished", "failed", "stopped"})
_MAX_EVENTS = 10_000
_MAX_METRICS = 20_000
_UNKNOWN_S = 120.0
"""A run of which nothing has spoken for so long after its start has failed."""

_T = TypeVar("_T")


class _Launcher(NamedTuple):
    node: str
    pid: int
    incarnation: int


class Serial(deque[_T]):
    """The newest items, numbered from 1."""

    serial = 0

    def append(self, item: _T) -> None:
        """Add an item under the next number."""
        self.serial += 1
        super().append(item)

    def after(self, serial: int) -> list[_T]:
        """Return the kept items numbered above `serial`."""
        fresh = min(self.serial - serial, len(self))
        return [self[index] for index in range(len(self) - fresh, len(self))] if fresh > 0 else []


class RunState:
    """Everything that is kept in memory of one run."""

    def __init__(self, run: RunFolder) -> None:
        """Begin from run.json and outcome.json, where they are."""
        self.run = run
        self.info = pb.RunInfo(run_id=run.run_id, run_dir=str(run.path), state="starting", name=run.run_id)
        self.ranks: dict[int, RankView] = {}
        self.nodes: dict[str, pb.NodeState] = {}
        self.history = StepHistory()
        self.collectives = CollectiveTable()
        self.events: Serial[pb.TimedEvent] = Serial(maxlen=_MAX_EVENTS)
        self.metrics: Serial[pb.TimedMetrics] = Serial(maxlen=_MAX_METRICS)
        self.diagnosis: list[pb.Diagnosis] = []
        self.watched_since_s = time.time()
        """Since when a lack of news counts: before, nobody listened."""
        self._launcher: _Launcher | None = None
        self._launcher_ticks: int | None = None
        self._seen_seq: dict[tuple[int, str, int], int] = {}
        self._dropped: dict[tuple[int, str, int], int] = {}
        self._rank_errors: dict[int, str] = {}
        self._read_spec()

    # ---- what comes in

    def unseen(self, batch: pb.Batch) -> list[pb.Record]:
        """Return the records of the batch that were not taken before."""
        seen = self._seen_seq.get(_source(batch), 0)
        return [record for record in batch.records if record.seq > seen]

    def seen_seq(self, batch: pb.Batch) -> int:
        """Return the last sequence number taken from the batch's source."""
        return self._seen_seq.get(_source(batch), 0)

    def apply(self, batch: pb.Batch, heard_s: float = 0.0) -> None:
        """Take a batch; `heard_s` is when it came, 0 from disk."""
        key, rank = _source(batch), batch.source.rank
        self._dropped[key] = max(batch.dropped, self._dropped.get(key, 0))
        view = self._view(batch, heard_s) if rank >= 0 else None
        if rank == LAUNCHER:
            self._launcher = _Launcher(batch.source.node, batch.source.pid, batch.source.incarnation)
        for record in self.unseen(batch):
            self._seen_seq[key] = record.seq
            self._apply(batch.source, record, view)

    def set_hardware(self, node: str, sample: pb.HardwareSample, time_s: float) -> None:
        """Take a sample of a node's hardware."""
        self.nodes[node] = pb.NodeState(node=node, hardware=sample, last_seen_s=time_s)

    def _view(self, batch: pb.Batch, heard_s: float) -> RankView | None:
        """Return the rank's view; None where a newer incarnation has spoken."""
        source = batch.source
        view = self.ranks.get(source.rank)
        if view is None or source.incarnation > view.incarnation:
            view = RankView(source.rank, source.node, source.pid, source.incarnation)
            self.ranks[source.rank] = view
            self.ranks = dict(sorted(self.ranks.items()))
        elif source.incarnation < view.incarnation:
            return None
        view.heard_s = max(view.heard_s, heard_s)
        return view

    def _apply(self, source: pb.Source, record: pb.Record, view: RankView | None) -> None:
        kind = record.WhichOneof("body")
        if view is not None:
            if kind == "step":
                self._step(view, record)
            view.apply(record)
        if kind == "collective" and source.rank >= 0:
            self.collectives.add(source.rank, record.collective)
        elif kind == "event":
            self.events.append(pb.TimedEvent(time_s=record.time_s, rank=source.rank, event=record.event))
        elif kind == "metrics":
            self.metrics.append(pb.TimedMetrics(time_s=record.time_s, rank=source.rank, metrics=record.metrics))
        elif kind == "hardware":
            self.set_hardware(source.node, record.hardware, record.time_s)
        elif kind == "run_started":
            self._run_started(record.run_started, record.time_s)
        elif kind == "run_finished":
            self._end(record.run_finished, record.time_s)
        elif kind == "rank_started":
            self.info.world_size = max(self.info.world_size, record.rank_started.world_size)
            if not self.info.started_s:
                self.info.started_s = record.time_s

    def _step(self, view: RankView, record: pb.Record) -> None:
        if view.last_step is None and record.step.step <= self.history.last_step():
            self.history.rewind(record.step.step)
        self.history.add(view.rank, record.step, record.time_s, self._expected_ranks(), self._peak_flops())
        if self.info.state == "starting":
            self.info.state = "running"

    def _expected_ranks(self) -> int:
        if self.info.num_nodes <= 1 and self.info.world_size:
            return self.info.world_size
        return max(1, len(self.ranks))

    def _peak_flops(self) -> dict[int, float]:
        return {
            rank: view.started.peak_flops for rank, view in self.ranks.items() if view.started.HasField("peak_flops")
        }

    def _run_started(self, started: pb.RunStarted, time_s: float) -> None:
        info = self.info
        info.name, info.strategy, info.config_toml = started.name, started.strategy, started.config_toml
        info.world_size, info.num_nodes = started.world_size, started.num_nodes
        del info.command[:]
        info.command.extend(started.command)
        info.planned_memory_bytes.clear()
        info.planned_memory_bytes.update(started.planned_memory_bytes)
        info.started_s = info.started_s or time_s

    def _end(self, finished: pb.RunFinished, time_s: float) -> None:
        if self.is_final() and self.info.HasField("exit_status"):
            return
        self.info.state = finished.state if finished.state in FINAL_STATES else "failed"
        self.info.exit_status, self.info.message, self.info.finished_s = finished.exit_status, finished.message, time_s
        self.history.flush(self._expected_ranks(), self._peak_flops())

    def _read_spec(self) -> None:
        spec = read_json(self.run.spec)
        if not spec:
            return
        try:
            names = ("name", "command", "strategy", "config_toml", "world_size", "num_nodes", "planned_memory_bytes")
            self._run_started(pb.RunStarted(**{name: spec[name] for name in names if spec.get(name)}), 0.0)
            self.info.started_s = float(spec.get("started_s") or 0.0)
        except (TypeError, ValueError) as error:
            self.info.message = f"run.json cannot be read: {error}"

    # ---- what time tells

    def refresh(self, now_s: float) -> None:
        """Look at the processes and at outcome.json, and work out the run's state and the diagnosis."""
        self._read_outcome()
        if not self.is_final():
            for view in self.ranks.values():
                view.probe(now_s)
            self._notice_end(now_s)
        if not self.is_final():
            self.history.expire(now_s, self._expected_ranks(), self._peak_flops())
        self.diagnosis = diagnose(self, now_s)
        if not self.is_final():
            hangs = any(found.kind == "hang" for found in self.diagnosis)
            stepped = any(view.step() for view in self.ranks.values())
            self.info.state = "stalled" if hangs else "running" if stepped else "starting"

    def is_final(self) -> bool:
        """Tell whether the run has ended."""
        return self.info.state in FINAL_STATES

    def is_alive(self) -> bool:
        """Tell whether the run has not ended and its launcher or a rank is still there."""
        if self.is_final():
            return False
        return self._launcher_alive() or any(view.alive and view.finished is None for view in self.ranks.values())

    def _launcher_alive(self) -> bool:
        found = self._launcher
        if found is None or found.node != HOST:
            return False
        sight = process.find(found.pid, found.incarnation / 1e9, self._launcher_ticks)
        if sight is not None:
            self._launcher_ticks = sight.start_ticks
        return sight is not None

    def _read_outcome(self) -> None:
        if self._rank_errors or (self.is_final() and self.info.HasField("exit_status") and self._outcome_read):
            return
        outcome = read_json(self.run.outcome)
        if not outcome:
            return
        self._outcome_read = True
        try:
            finished = pb.RunFinished(
                state=str(outcome["state"]), exit_status=int(outcome["exit_status"]), message=str(outcome["message"])
            )
            self._end(finished, float(outcome["finished_s"]))
            self._rank_errors = {int(rank["rank"]): str(rank["error"]) for rank in outcome["ranks"] if rank["error"]}
            failed = outcome.get("failed_rank")
            self.failed_rank = None if failed is None else int(failed)
        except (KeyError, TypeError, ValueError) as error:
            self._end(pb.RunFinished(state="failed", exit_status=1, message=f"outcome.json: {error!r}"), 0.0)

    _outcome_read = False
    failed_rank: int | None = None
    """The rank that failed first, where the launcher told."""

    def _notice_end(self, now_s: float) -> None:
        """A run whose launcher and ranks are all gone has ended, though nobody said so."""
        if self.is_alive():
            return
        if not self.ranks and self._launcher is None:
            if now_s - max(self.info.started_s, self.watched_since_s - _UNKNOWN_S) < _UNKNOWN_S:
                return
            message = f"nothing of it has spoken within {_UNKNOWN_S:.0f} s of its start"
        else:
            views = self.ranks.values()
            if views and all(view.finished is not None and view.finished.exit_status == 0 for view in views):
                self._end(pb.RunFinished(state="finished"), max(view.last_seen_s for view in views))
                return
            message = "the launcher and all ranks are gone without a word"
        self.info.state, self.info.message = "failed", message
        self.info.finished_s = max([view.last_seen_s for view in self.ranks.values()], default=self.info.started_s)

    # ---- what goes out

    def snapshot(self, now_s: float) -> pb.Snapshot:
        """Return what watchers see; `refresh` first."""
        ranks = [
            view.message(view.state(now_s, self.info.state), self._rank_errors.get(rank, ""))
            for rank, view in self.ranks.items()
        ]
        return pb.Snapshot(
            run=self.info,
            ranks=ranks,
            diagnosis=self.diagnosis,
            dropped=sum(self._dropped.values()),
            collectives=self.collectives.summaries(),
            nodes=[self.nodes[node] for node in sorted(self.nodes)],
        )


def replay(run: RunFolder, batches: Iterable[pb.Batch]) -> RunState:
    """Return the state that the batches lead to."""
    state = RunState(run)
    for batch in batches:
        state.apply(batch)
    return state


def _source(batch: pb.Batch) -> tuple[int, str, int]:
    source = batch.source
    # Daemons of several nodes share the number -2, launchers -1; ranks have their own.
    return source.rank, source.node if source.rank < 0 else "", source.incarnation
