"""What is known of a run: the sum of all batches of its sources, the same whether they come live or from disk."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from distui.core.paths import RunFolder
from distui.core.telemetry.harmless import harmless, make_harmless
from distui.core.telemetry.kinds import AGAIN, FOR_A_PERSON, RESTART
from distui.daemon.diagnosis.collectives import CollectiveTotals
from distui.daemon.diagnosis.trends import Lasting, LossTrend, MemoryTrend
from distui.daemon.node.cgroups import Throttling
from distui.daemon.runs.batches import DAEMON, LAUNCHER, MAX_DIGITS, MAX_RANKS
from distui.daemon.runs.effort import Effort
from distui.daemon.runs.folders import FINAL_STATES, apply_outcome, read_earlier, read_info, read_outcome
from distui.daemon.runs.history import History
from distui.daemon.runs.step_summaries import StepSummaries
from distui.proto import telemetry_pb2 as pb

OWN_STRATEGY = "the script's own strategy"
MEAN_STEPS = 20
Parts = tuple[float, float, float, float]
"""Of a step: data, forward, backward, optimizer. Units: seconds."""
WARM_STEPS = 20
CPU_FULL = 95.0
NUM_EVENTS = 2000
NUM_METRICS = 4096
_COMMON = frozenset({"event", "metrics", "hardware"})
"""What any source may say, whatever has become of it."""
_WITHOUT_TEXT = frozenset({"step", None})


@dataclass(slots=True)
class RankRecord:
    """One rank as its newest incarnation tells of itself."""

    rank: int
    node: str
    pid: int
    incarnation: int
    last_seen_s: float = 0.0
    started: pb.RankStarted | None = None
    finished: pb.RankFinished | None = None
    last_step: pb.Step | None = None
    loss: float | None = None
    memory: pb.Memory | None = None
    heartbeat: pb.Heartbeat | None = None
    closed: bool = False
    """Whether it has ended its telemetry in good order, with or without saying how its script ended."""
    bad_since_s: float = 0.0
    bad_since_step: int = 0
    last_parts: deque[tuple[int, Parts]] = field(default_factory=lambda: deque(maxlen=MEAN_STEPS))
    recent: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=MEAN_STEPS))
    last_step_s: float = 0.0
    losses: LossTrend = field(default_factory=LossTrend)
    host_growth: MemoryTrend = field(default_factory=MemoryTrend)
    device_growth: MemoryTrend = field(default_factory=MemoryTrend)
    heard_s: float = 0.0
    """When this daemon last heard of it, by its own clock; 0 where it only read of it. Units: Unix seconds."""

    @property
    def began_s(self) -> float:
        """When its source began. Units: Unix seconds."""
        return self.incarnation / 1e9

    def note_loss(self, step: pb.Step, time_s: float) -> None:
        """Keep a step's loss, and since when it has been no number."""
        self.loss = step.loss
        if math.isfinite(step.loss):
            self.bad_since_s, self.bad_since_step = 0.0, 0
            rate = step.learning_rate if step.HasField("learning_rate") else None
            self.losses.add(step.step, step.loss, time_s, rate)
        elif not self.bad_since_step and not step.skipped:  # a loss scale that is too large is no loss that went bad
            self.bad_since_s, self.bad_since_step = time_s, step.step

    def note_memory(self, memory: pb.Memory, time_s: float) -> None:
        """Keep what it holds, and from when on it should grow no more how that goes on."""
        self.memory = memory
        if self.last_step is not None and self.last_step.step > WARM_STEPS:
            # A data set that is mapped grows in memory as it is read, and gives way to whoever needs it.
            self.host_growth.add(time_s, max(0, memory.rss_bytes - memory.file_bytes))
            self.device_growth.add(time_s, memory.allocated_bytes)


@dataclass(slots=True)
class GpuFault:
    """What has gone wrong with one GPU since the run began to hear of it."""

    gpu: pb.Gpu
    """As it was when the run first heard of it."""
    since_s: float = 0.0
    last_s: float = 0.0
    xid: int | None = None
    uncorrected: int = 0
    nvlink: int = 0
    pcie: int = 0

    def note(self, now: pb.Gpu, time_s: float) -> None:
        """Count what has come since the first sample. Units: Unix seconds."""
        before = self.gpu
        if now.xid_errors < before.xid_errors or now.ecc_uncorrected < before.ecc_uncorrected:
            self.gpu = before = now  # the daemon, or the driver, has begun to count anew
        uncorrected = max(self.uncorrected, now.ecc_uncorrected - before.ecc_uncorrected)
        xid = now.last_xid if now.xid_errors > before.xid_errors else self.xid
        if (uncorrected, xid) != (self.uncorrected, self.xid):
            self.since_s, self.last_s = self.since_s or time_s, time_s
        self.uncorrected, self.xid = uncorrected, xid
        self.nvlink = max(0, now.nvlink_errors - before.nvlink_errors)
        self.pcie = max(0, now.pcie_replays - before.pcie_replays)


class RunState:
    """Reduces a run's batches. `version` grows with every change that a watcher could see."""

    def __init__(self, run: RunFolder) -> None:
        """Begin with what run.json and outcome.json say."""
        self.run = run
        self.info = read_info(run)
        self.ranks: dict[int, RankRecord] = {}
        self.launcher: RankRecord | None = None
        self.nodes: dict[str, pb.NodeState] = {}
        self.cpu_full_s: dict[str, float] = {}
        """When a node's processors were last seen to have nothing left. Units: Unix seconds."""
        self.gpu_faults: dict[tuple[str, int], GpuFault] = {}
        self.steps = StepSummaries()
        earlier = read_earlier(run)
        self.effort = Effort(earlier)
        self.info.restarts = int(earlier["restarts"]) if earlier is not None else 0
        self.effort.begin(self.info.started_s)
        self.events: History[pb.TimedEvent] = History(NUM_EVENTS, 0)
        self.metrics: History[pb.TimedMetrics] = History(NUM_METRICS, NUM_METRICS)
        self.collectives = CollectiveTotals()
        self.data_bound = Lasting(begin=0.25, end=0.15)
        self.launcher_stopped = Lasting(begin=1.0, end=1.0)
        self.throttling = Throttling()
        self.clock_set_s = 0.0
        """When the clock of this node was last seen to jump: what waits is counted from then. Units: Unix seconds."""
        self.version = 0
        self.many: Any = None
        """At the head of a job that is rolled up: `tree.many.Many`, which has its ranks."""
        self.told_final = False  # by the launcher's own RunFinished, which outranks outcome.json
        self._marks: dict[tuple[int, str, int], int] = {}
        self._dropped: dict[tuple[int, str, int], int] = {}
        self._peak_flops: dict[int, float] = {}
        self._replaced: dict[int, int] = {}
        """By rank, the newest incarnation that was ended so that the job could be started again."""

    @property
    def final(self) -> bool:
        """Whether the run has ended and it is known how."""
        return self.info.state in FINAL_STATES

    @property
    def dropped(self) -> int:
        """Records that sources lost, and those that could not be kept."""
        return sum(self._dropped.values())

    def world_size(self) -> int:
        """Return how many ranks there are, as far as is known."""
        return max(self.info.world_size, len(self.ranks), 1)

    def kept_seq(self, source: pb.Source) -> int:
        """Return up to where the records of a source are known."""
        return self._marks.get(_key(source), 0)

    def kept_by_others(self, source: pb.Source) -> bool:
        """Tell whether an earlier daemon of the node has written of this run."""
        return any(
            rank == DAEMON and node == source.node and incarnation != source.incarnation
            for rank, node, incarnation in self._marks
        )

    def only_new(self, batch: pb.Batch) -> bool:
        """Cut from `batch` the records that are known already; return whether anything is left."""
        known = self.kept_seq(batch.source)
        while batch.records and batch.records[-1].seq <= known:
            del batch.records[-1]
        while batch.records and batch.records[0].seq <= known:
            del batch.records[0]
        return bool(batch.records) or batch.dropped > self._dropped.get(_key(batch.source), 0)

    def lose(self, num_records: int) -> None:
        """Count records that this daemon could not keep."""
        key = (DAEMON, "", 0)
        self._dropped[key] = self._dropped.get(key, 0) + num_records

    def apply(self, batch: pb.Batch, heard_s: float = 0.0) -> set[str | None]:
        """Take in a batch of records that are not known yet; what they say is made harmless, in the batch.

        `heard_s` is when it came, by the clock of this node; 0 where it is read from disk. Units: Unix seconds.
        Returns: the kinds of its records.
        """
        source, key = batch.source, _key(batch.source)
        source.node = harmless(source.node)
        self._dropped[key] = max(batch.dropped, self._dropped.get(key, 0))
        if not batch.records:
            return set()
        self._marks[key] = max(batch.records[-1].seq, self._marks.get(key, 0))
        self.version += 1
        # Each look at a record in a batch makes an object of it: once is enough.
        found = [(record, record.WhichOneof("body")) for record in batch.records]
        kinds = {body for _, body in found}
        for record, body in found:
            if body not in _WITHOUT_TEXT:
                make_harmless(getattr(record, body))
        if source.rank == DAEMON:
            for record, body in found:
                self._apply_common(source, record, body)
            return kinds
        speaker = self._speaker(source)
        if speaker is not None:
            speaker.last_seen_s, speaker.closed = max(speaker.last_seen_s, batch.records[-1].time_s), batch.last
            speaker.heard_s = heard_s or speaker.heard_s
        world_size = self.world_size()
        for record, body in found:
            if body == "collective":
                if speaker is not None:
                    self.collectives.add(source.rank, record.collective, world_size)
            elif body in _COMMON:
                self._apply_common(source, record, body)
            elif speaker is not None:
                self._apply_own(speaker, record, body)
                world_size = self.world_size()
        return kinds

    def check_outcome(self) -> None:
        """See whether the launcher has written outcome.json; a run that has ended gets its last steps summed up."""
        if not self.told_final and not self.final:
            apply_outcome(self.info, read_outcome(self.run))
            self.version += self.final
        if self.final:
            self.steps.close_all(self.world_size(), self._peak_flops)

    def _speaker(self, source: pb.Source) -> RankRecord | None:
        """Return the record of who speaks; None for an incarnation that a newer one has replaced."""
        known = self.launcher if source.rank == LAUNCHER else self.ranks.get(source.rank)
        if source.incarnation <= self._replaced.get(source.rank, 0):
            return None
        if known is not None and known.incarnation >= source.incarnation:
            return known if known.incarnation == source.incarnation else None
        fresh = RankRecord(source.rank, source.node, source.pid, source.incarnation)
        if source.rank == LAUNCHER:
            self.launcher = fresh
        else:
            self.ranks[source.rank] = fresh
        if known is not None and source.rank >= 0:
            self.steps.restarted(source.rank)
            self.collectives.restarted(source.rank)
        return fresh

    def _apply_own(self, speaker: RankRecord, record: pb.Record, body: str | None) -> None:
        """Take in what only a source's newest incarnation may say."""
        if body == "step":
            step = record.step
            speaker.last_step, speaker.last_step_s = step, record.time_s
            speaker.recent.append((step.step_s, step.tokens, step.samples))
            parts = (step.data_wait_s, step.forward_s, step.backward_s, step.optimizer_s)
            speaker.last_parts.append((step.step, parts))
            if step.HasField("loss"):
                speaker.note_loss(step, record.time_s)
            self.effort.step(step.step, record.time_s, step.step_s)
            self.steps.add(speaker.rank, record.time_s, step, self.world_size(), self._peak_flops)
        elif body == "heartbeat":
            speaker.heartbeat = record.heartbeat
            self.collectives.entered(speaker.rank, dict(record.heartbeat.last_seq))
        elif body == "memory":
            speaker.note_memory(record.memory, record.time_s)
        elif body == "rank_started":
            speaker.started = record.rank_started
            self.info.world_size = max(self.info.world_size, record.rank_started.world_size)
            if record.rank_started.own_strategy:
                self.info.strategy = OWN_STRATEGY  # what the settings say of it holds for engines only
            elif record.rank_started.strategy:
                self.info.strategy = record.rank_started.strategy
            if record.rank_started.HasField("layout"):
                self.info.layout.CopyFrom(record.rank_started.layout)
            if record.rank_started.HasField("peak_flops"):
                self._peak_flops[speaker.rank] = record.rank_started.peak_flops
        elif body == "rank_finished":
            speaker.finished = record.rank_finished
        elif body == "run_started":
            self._run_started(record.run_started)
        elif body == "run_finished" and record.run_finished.state in FINAL_STATES:
            finished = record.run_finished
            self.told_final = True
            self.info.state, self.info.exit_status = finished.state, finished.exit_status
            self.info.message, self.info.finished_s = finished.message, record.time_s

    def _apply_common(self, source: pb.Source, record: pb.Record, body: str | None) -> None:
        if body == "event":
            self.events.append(pb.TimedEvent(time_s=record.time_s, rank=source.rank, event=record.event))
            if record.event.kind in FOR_A_PERSON:
                self._excuse(source.rank, record.event)
            elif record.event.kind == RESTART and source.rank == LAUNCHER:
                self._restarted()
                self.effort.failed(_told_s(record))
            elif record.event.kind == AGAIN and source.rank == LAUNCHER:
                self.effort.ready(_told_s(record))
                for name in ("world_size", "num_nodes"):  # a job may go on with fewer hosts
                    if (told := record.event.attributes.get(name, "")[:MAX_DIGITS]).isdecimal():
                        setattr(self.info, name, min(int(told), MAX_RANKS))
        elif body == "all_ranks" and source.rank == DAEMON:
            self.steps.summed(record.all_ranks)
            self.effort.step(record.all_ranks.step, record.time_s, record.all_ranks.step_s)
        elif body == "metrics":
            self.metrics.append(pb.TimedMetrics(time_s=record.time_s, rank=source.rank, metrics=record.metrics))
        elif body == "hardware":
            self.nodes[source.node] = pb.NodeState(
                node=source.node, hardware=record.hardware, last_seen_s=record.time_s
            )
            if record.hardware.cpu_percent - record.hardware.cpu_nice_percent >= CPU_FULL:
                self.cpu_full_s[source.node] = record.time_s
            for gpu in record.hardware.gpus:
                known = self.gpu_faults.setdefault((source.node, gpu.index), GpuFault(gpu))
                known.note(gpu, record.time_s)

    def _restarted(self) -> None:
        """Forget the ranks that were ended for a restart: that they are gone is no fault of theirs."""
        self.info.restarts += 1
        if self.many is not None:
            self.many.restarted()
        for rank, record in self.ranks.items():
            self._replaced[rank] = record.incarnation
            self.steps.restarted(rank)
            self.collectives.restarted(rank)
        self.ranks.clear()

    def _excuse(self, rank: int, event: pb.Event) -> None:
        try:
            began_s, ended_s = (float(event.attributes[name]) for name in ("began_s", "ended_s"))
        except (KeyError, ValueError):
            return  # it has only begun
        self.collectives.pace.excuse(rank, began_s, ended_s)

    def _run_started(self, started: pb.RunStarted) -> None:
        info = self.info
        for name in ("name", "strategy", "config_toml", "world_size", "num_nodes"):
            if value := getattr(started, name):
                setattr(info, name, value)
        if started.command:
            info.ClearField("command")
            info.command.extend(started.command)
        for category, num_bytes in started.planned_memory_bytes.items():
            info.planned_memory_bytes[category] = num_bytes


def _told_s(record: pb.Record) -> float:
    """Return when it happened, by whoever did it: the launcher tells of it a moment later. Units: Unix seconds."""
    try:
        return float(record.event.attributes["time_s"])
    except (KeyError, ValueError):
        return record.time_s


def _key(source: pb.Source) -> tuple[int, str, int]:
    return source.rank, harmless(source.node), source.incarnation
