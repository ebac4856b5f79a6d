"""What the dashboard knows of a run: filled from Updates by one worker, read by the views; no screen in it."""

from __future__ import annotations

import bisect
import copy
import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from distui.core.axes.sizes import AxisSizes
from distui.core.paths import is_run_id
from distui.proto import telemetry_pb2 as pb
from distui.tui.monitor.history import StepHistory
from distui.tui.monitor.stage_waits import StageWaits

FINAL_STATES = frozenset({"finished", "failed", "stopped"})
MAX_EVENTS = 2000
MAX_METRIC_POINTS = 2000
CATEGORIES = ("parameters", "gradients", "optimizer_states", "buffers", "activations")
"""The known categories of memory in the order they are drawn; others follow by name."""
OTHER = "other"


@dataclass(frozen=True)
class MemoryUse:
    """One rank's memory now. Units: bytes; None is not available."""

    by_category: Mapping[str, int]
    total: int | None
    limit: int | None
    peak: int | None

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The parts by name."""
        return dict(self.parts)

    @functools.cached_property
    def parts(self) -> list[tuple[str, int]]:
        """The categories in drawing order, then what the total holds beyond them as `other`."""
        names = [name for name in CATEGORIES if name in self.by_category]
        names += sorted(set(self.by_category) - set(CATEGORIES))
        found = [(name, self.by_category[name]) for name in names]
        rest = (self.total or 0) - sum(size for _, size in found)
        return [*found, (OTHER, rest)] if found and rest > 0 else found


def category_title(name: str) -> str:
    """Return a category's name as it is shown: `optimizer states`."""
    return name.replace("_", " ")


def memory_of(rank: pb.RankState) -> MemoryUse:
    """Return what a rank's memory is made of, as far as it is known."""
    memory = rank.memory
    peak = optional(memory, "peak_allocated_bytes")
    return MemoryUse(
        by_category=dict(memory.by_category_bytes),
        total=optional(rank, "memory_bytes"),
        limit=optional(memory, "device_total_bytes"),
        peak=peak if peak is not None else optional(memory, "peak_rss_bytes"),
    )


def optional(message: Message, name: str) -> Any:
    """Return an optional field of a proto message, None where it is absent."""
    return getattr(message, name) if message.HasField(name) else None


class RunModel:
    """One run as it is known now: snapshot, bounded histories of steps, events and metrics.

    `version` grows with each update, so that a view can tell whether anything changed since it was drawn.
    """

    def __init__(self, run_id: str, history: StepHistory | None = None) -> None:
        self.run_id = run_id
        self.snapshot: pb.Snapshot | None = None
        self.history = history or StepHistory()
        self.events: deque[pb.TimedEvent] = deque(maxlen=MAX_EVENTS)
        self.metrics: dict[str, deque[tuple[float, int, float]]] = {}
        self.version = 0
        self.server_time_s = 0.0
        self.received_s = 0.0
        self.ranks: list[pb.RankState] = []
        """The ranks heard of so far, by number."""
        self.hosts: list[pb.Host] = []
        """Where there are too many ranks to show: the hosts, the sickest first; `ranks` has the sickest of each."""
        self._rows: dict[str, int] = {}
        self._by_number: dict[int, pb.RankState] = {}
        self._waits = StageWaits()
        self._event_steps: tuple[object, list[tuple[float, str, int]]] = (None, [])
        self._seen_events: set[tuple[float, int, str, str]] = set()
        self._seen_metrics: set[tuple[float, int]] = set()

    def apply(self, update: pb.Update, received_s: float) -> None:
        """Take in what the daemon sent; what is already known (it repeats all after a reconnect) changes nothing."""
        self.snapshot = update.snapshot
        self.ranks = sorted(update.snapshot.ranks, key=lambda rank: rank.rank)
        self.hosts = list(update.snapshot.hosts)
        self._rows = {host.node: host.row for host in self.hosts}
        if self.hosts:
            places = {host.node: place for place, host in enumerate(self.hosts)}
            self.ranks.sort(key=lambda rank: places.get(rank.node, len(places)))
        self._by_number = {rank.rank: rank for rank in self.ranks}
        if is_run_id(update.snapshot.run.run_id):  # it names files: a daemon may be another user's
            self.run_id = update.snapshot.run.run_id
        self.server_time_s, self.received_s = update.server_time_s, received_s
        if update.snapshot.run.layout.pp > 1:
            self._waits.note(update.server_time_s, update.snapshot.collectives)
        for summary in update.steps:
            self.history.append(summary)
        self._add_events(update)
        for point in update.metrics:
            if (point.time_s, point.rank) in self._seen_metrics:
                continue
            self._seen_metrics.add((point.time_s, point.rank))
            for name, value in point.metrics.values.items():
                series = self.metrics.setdefault(name, deque(maxlen=MAX_METRIC_POINTS))
                series.append((point.time_s, point.metrics.step, value))
        self.version += 1

    def _add_events(self, update: pb.Update) -> None:
        added = False
        for event in update.events:
            key = (event.time_s, event.rank, event.event.kind, event.event.message)
            if key not in self._seen_events:
                self._seen_events.add(key)
                self.events.append(event)
                added = True
        if added:
            self.events = deque(sorted(self.events, key=lambda event: event.time_s), maxlen=MAX_EVENTS)

    def freeze(self) -> RunModel:
        """Return the run as it is now; later updates do not change it."""
        frozen = copy.copy(self)
        frozen.history = self.history.copy()
        frozen._waits = copy.deepcopy(self._waits)
        frozen.events = self.events.copy()
        frozen.metrics = {name: series.copy() for name, series in self.metrics.items()}
        return frozen

    @property
    def run(self) -> pb.RunInfo:
        """The run's description; empty before the first update."""
        return self.snapshot.run if self.snapshot is not None else pb.RunInfo(run_id=self.run_id)

    @property
    def diagnosis(self) -> list[pb.Diagnosis]:
        """What the daemon found to be wrong now."""
        return list(self.snapshot.diagnosis) if self.snapshot is not None else []

    @property
    def collectives(self) -> list[pb.CollectiveSummary]:
        """The run's collectives by group and operation."""
        return list(self.snapshot.collectives) if self.snapshot is not None else []

    @property
    def state(self) -> str:
        """The run's state; "" before the first update."""
        return self.run.state

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.state in FINAL_STATES

    def elapsed_s(self, now_s: float) -> float | None:
        """Return how long the run has lasted, or did last; None before it is known."""
        if not self.run.started_s:
            return None
        if self.run.HasField("finished_s"):
            return self.run.finished_s - self.run.started_s
        if self.ended:
            return None
        return self.now(now_s) - self.run.started_s

    def now(self, now_s: float) -> float:
        """Return the daemon's time: its last, and what has passed here since. Units: Unix seconds."""
        return self.server_time_s + max(0.0, now_s - self.received_s)

    def row(self, rank: int) -> int:
        """Return where in a step's times a rank's is: of many ranks, where its host's slowest is."""
        return self._rows.get(self.host(rank), rank) if self.hosts else rank

    def host(self, rank: int) -> str:
        """Return the host that has a rank; "" where that is not known."""
        if (known := self.rank(rank)) is not None:
            return known.node
        return next((one.node for one in self.hosts if 0 <= rank - one.first_rank < one.num_ranks), "")

    def rank(self, number: int) -> pb.RankState | None:
        """Return one rank's state; None where nothing was heard of it."""
        return self._by_number.get(number)

    @property
    def axes(self) -> AxisSizes | None:
        """How the ranks are cut over the model's axes; None where all are data-parallel, or nobody has said."""
        told = self.run.layout
        sizes = AxisSizes(told.pp, told.dp, told.cp, told.tp)
        # What does not multiply to the world is another's, or damaged: better no coordinates than wrong ones.
        return sizes if sizes.has_model_axes and sizes.world == self.run.world_size else None

    def stage_waits(self) -> list[float | None]:
        """Return for each stage of the pipeline what share of the time it waited for others of late."""
        return self._waits.shares(self.axes or AxisSizes())

    def tokens_per_s(self) -> float | None:
        """Return the newest rate over all ranks; None where the script counts no tokens."""
        return self.history.last("tokens_per_s")

    @property
    def rate(self) -> tuple[str, str]:
        """The column of the rate that this script has, and its unit: samples where it counts no tokens."""
        if self.history.last("tokens_per_s") is None and self.history.last("samples_per_s") is not None:
            return "samples_per_s", "samples/s"
        return "tokens_per_s", "tok/s"

    def planned_bytes(self) -> int | None:
        """Return the memory the plan gave each rank; None without a plan."""
        planned = self.run.planned_memory_bytes
        return sum(planned.values()) if planned else None

    def fullest_rank(self) -> pb.RankState | None:
        """Return the rank with the most memory in use; None where no rank says."""
        known = [rank for rank in self.ranks if rank.HasField("memory_bytes")]
        return max(known, key=lambda rank: rank.memory_bytes, default=None)

    def event_steps(self) -> list[tuple[float, str, int]]:
        """Return (step, kind, level) of each event that has a place on a chart's axis, oldest first."""
        key = self.version, self.history.revision
        if self._event_steps[0] != key:
            self._event_steps = key, self._find_event_steps()
        return self._event_steps[1]

    def _find_event_steps(self) -> list[tuple[float, str, int]]:
        times, steps = self.history.column("time_s"), self.history.column("step")
        if not times:
            return []
        marks = []
        for event in self.events:
            if event.event.kind in QUIET_KINDS or not times[0] <= event.time_s <= times[-1]:
                continue
            step = steps[min(len(steps) - 1, bisect.bisect_left(times, event.time_s))]
            marks.append((step, event.event.kind, int(event.event.level)))
        return marks


QUIET_KINDS = frozenset({"rank_started", "rank_finished", "run_started", "run_finished"})
"""Events of every run's life, which would only clutter a chart."""
