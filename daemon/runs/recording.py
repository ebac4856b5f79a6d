"""A run's log as a recording: what happened when, and the run as it was at any moment of it.

    log ──read_more──> index by time ──move──> RunState at `at_s` ──snapshot──> what a watcher saw then

It is the reducer of the live view, given only the records up to the cursor. On the way it keeps copies of the state, so
that going back re-reads a part of the log and not all of it. What was wrong at a moment is what the daemon said at that
moment: ledgers and processes of then are not there any more.
"""

from __future__ import annotations

import bisect
import io
import pickle
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.observe import DEAD, FINISHED, RUNNING, Observed, Wait
from distui.daemon.runs.batches import DAEMON
from distui.daemon.runs.folders import FINAL_STATES
from distui.daemon.runs.snapshot import STALLED, rank_state, take_snapshot
from distui.daemon.runs.state import RankRecord, RunState
from distui.daemon.runs.store import LogTail, Position, read_batch, segment_files
from distui.daemon.runs.unsent import read_unsent, unsent_files
from distui.proto import telemetry_pb2 as pb

SLICE_BATCHES = 32
"""Batches between two pauses of `read_more` and `move`, in which the caller's event loop may run."""
MAX_COPIES = 32
MIN_COPY_RECORDS = 20_000

Key = tuple[int, str, int]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a batch lies in time and in the log; what a rank could not send is kept as it is."""

    first_s: float
    last_s: float
    num_records: int
    position: Position | pb.Batch


@dataclass(frozen=True, slots=True)
class _Copy:
    """The state at a moment. Messages are shared with the state it was taken of: nobody changes them."""

    at_s: float
    index: int
    body: bytes
    messages: list[Message]
    rests: dict[Key, tuple[pb.Batch, ...]]


class Recording:
    """The log of one run with a cursor. `epoch` grows when the cursor goes back: what was shown before is void."""

    def __init__(self, run: RunFolder) -> None:
        """Begin before the first record. Nothing is read yet."""
        self.run = run
        self.at_s = 0.0
        self.epoch = 0
        self.num_records = 0
        self._tail, self._read_to = LogTail(run, Position()), Position()
        self._places: list[_Place] = []
        self._last_s = 0.0
        self._unsent: dict[str, int] = {}
        self._copies: list[_Copy] = []
        self._since_copy = 0
        self._told: tuple[int, list[tuple[pb.TimedEvent, pb.Diagnosis]]] = (-1, [])
        self._reset()

    def _reset(self) -> None:
        self.state = RunState(self.run)
        for name in ("state", "exit_status", "message", "finished_s"):  # how it ended is not known yet
            self.state.info.ClearField(name)
        self._index = 0
        self._rests: dict[Key, deque[pb.Batch]] = {}
        self.at_s = 0.0

    @property
    def first_s(self) -> float:
        """When the recording begins; 0 where it is empty. Units: Unix seconds."""
        return self._places[0].first_s if self._places else 0.0

    @property
    def last_s(self) -> float:
        """When its last record was made. Units: Unix seconds."""
        return self._last_s

    @property
    def at_end(self) -> bool:
        """Whether all that is known has been played."""
        return self.at_s >= self._last_s

    def read_more(self) -> Iterator[float]:
        """Take what the log has gained into the index; yield the share that is read. A run may still be writing."""
        sizes = {int(path.stem): found.st_size for path, found in segment_files(self.run).items()}
        total = sum(sizes.values())
        while found := self._tail.read(SLICE_BATCHES):
            for end, batch in found:
                start = self._read_to.offset if end.segment == self._read_to.segment else 0
                self._read_to = end
                if batch.records:
                    self._add(Position(end.segment, start), batch)
            before = sum(size for number, size in sizes.items() if number < self._read_to.segment)
            yield min(1.0, (before + self._read_to.offset) / max(1, total))
        for path in unsent_files(self.run):
            batches = read_unsent(path)
            for batch in batches[self._unsent.get(path.name, 0) :]:
                self._add(batch, batch)
            self._unsent[path.name] = len(batches)

    def _add(self, position: Position | pb.Batch, batch: pb.Batch) -> None:
        times = [record.time_s for record in batch.records]
        place = _Place(min(times), max(times), len(times), position)
        self.num_records += len(times)
        self._last_s = max(self._last_s, place.last_s)
        where = bisect.bisect_right(self._places, place.first_s, key=lambda known: known.first_s)
        self._places.insert(where, place)
        if where < self._index or (place.first_s <= self.at_s and self._index):
            # It came late (a daemon was away): the moment is past, and copies of later moments lack it.
            self._index += 1
            self._copies = [copy for copy in self._copies if copy.at_s < place.first_s]
            self._take(batch, self.at_s)

    def move(self, to_s: float) -> Iterator[float]:
        """Bring the state to the moment `to_s`; yield the share of the way that is done.

        Units: Unix seconds.
        """
        if to_s < self.at_s:
            self._go_back(to_s)
        began = self._index
        stop = bisect.bisect_right(self._places, to_s, key=lambda place: place.first_s)
        while self.at_s < to_s:
            ahead = self._index + SLICE_BATCHES
            target_s = to_s if ahead >= stop else min(to_s, self._places[ahead].first_s)
            self._advance(target_s)
            if self._since_copy >= max(MIN_COPY_RECORDS, self.num_records // MAX_COPIES):
                self._copy()
            yield min(1.0, (self._index - began) / max(1, stop - began))

    def _advance(self, to_s: float) -> None:
        for key in list(self._rests):
            waiting = self._rests.pop(key)
            while waiting and key not in self._rests:
                self._take(waiting.popleft(), to_s)
            if key in self._rests:
                self._rests[key].extend(waiting)
        while self._index < len(self._places) and self._places[self._index].first_s <= to_s:
            place = self._places[self._index]
            self._index += 1
            self._since_copy += place.num_records
            at = place.position
            self._take(read_batch(self.run, at) if isinstance(at, Position) else _copy_of(at), to_s)
        self.at_s = to_s

    def _take(self, batch: pb.Batch, to_s: float) -> None:
        """Apply the records up to `to_s` and keep the rest for later, in the source's own order."""
        key = (batch.source.rank, batch.source.node, batch.source.incarnation)
        if key in self._rests:
            self._rests[key].append(batch)
            return
        num_due = next((n for n, record in enumerate(batch.records) if record.time_s > to_s), len(batch.records))
        if num_due < len(batch.records):
            rest = pb.Batch(source=batch.source, records=batch.records[num_due:], dropped=batch.dropped)
            self._rests[key] = deque([rest])
            batch = pb.Batch(source=batch.source, records=batch.records[:num_due])
        if batch.records and self.state.only_new(batch):
            self.state.apply(batch)

    def _copy(self) -> None:
        """Keep the state as it is now."""
        self._since_copy = 0
        body, messages = _freeze(self.state)
        rests = {key: tuple(waiting) for key, waiting in self._rests.items()}
        if not self._copies or self._copies[-1].at_s < self.at_s:
            self._copies.append(_Copy(self.at_s, self._index, body, messages, rests))

    def _go_back(self, to_s: float) -> None:
        self.epoch += 1
        self._told = (-1, [])
        self._since_copy = 0
        best = next((copy for copy in reversed(self._copies) if copy.at_s <= to_s), None)
        if best is None:
            self._reset()
            return
        self.state = _thaw(best.body, best.messages)
        self._index, self.at_s = best.index, best.at_s
        self._rests = {key: deque(waiting) for key, waiting in best.rests.items()}

    def snapshot(self) -> pb.Snapshot:
        """Return the run as it was at the cursor; at the very end, as it is now."""
        if self.at_end:
            return take_snapshot(self.state, time.time())
        state, at_s = self.state, self.at_s
        diagnosis = self._diagnosis()
        snapshot = pb.Snapshot(
            run=state.info,
            diagnosis=diagnosis,
            dropped=state.dropped,
            collectives=state.collectives.summaries(),
            nodes=[state.nodes[node] for node in sorted(state.nodes)],
        )
        dead = {rank for found in diagnosis if found.kind in ("dead_rank", "out_of_memory") for rank in found.ranks}
        ranks = [_observed(state.ranks[number], number in dead) for number in sorted(state.ranks)]
        snapshot.ranks.extend(rank_state(state.ranks[rank.rank], rank, at_s) for rank in ranks)
        if state.info.state not in FINAL_STATES:
            begun = any(record.started is not None or record.last_step for record in state.ranks.values())
            held = any(found.kind in STALLED for found in diagnosis)
            snapshot.run.state = "stalled" if held else "running" if begun else "starting"
        return snapshot

    def _diagnosis(self) -> list[pb.Diagnosis]:
        """Return what the daemon had said was wrong, and had not said was over."""
        events = self.state.events
        if self._told[0] != events.head:
            self._told = (events.head, _open_verdicts(events.all()))
        for event, found in self._told[1]:
            found.since_s = max(0.0, self.at_s - event.time_s) + float(event.event.attributes.get("since_s", 0.0))
        return [found for _, found in self._told[1]]


def _open_verdicts(events: list[pb.TimedEvent]) -> list[tuple[pb.TimedEvent, pb.Diagnosis]]:
    present: dict[tuple[str, tuple[str, ...]], tuple[pb.TimedEvent, pb.Diagnosis]] = {}
    for timed in events:
        event = timed.event
        if timed.rank != DAEMON or "ranks" not in event.attributes:
            continue
        about = tuple(event.attributes.get(name, "") for name in ("ranks", "group"))
        if event.kind.endswith("_over"):
            present.pop((event.kind.removesuffix("_over"), about), None)
            continue
        present[event.kind, about] = (
            timed,
            pb.Diagnosis(
                kind=event.kind,
                ranks=[int(rank) for rank in about[0].split(",") if rank],
                collective=event.attributes.get("collective", ""),
                group=about[1],
                seq=int(event.attributes.get("seq") or 0),
                message=event.message,
            ),
        )
    return list(present.values())


def _observed(record: RankRecord, dead: bool) -> Observed:
    """Return a rank by its own records only."""
    found = Observed(record.rank, record.node, record.pid, RUNNING, last_seen_s=record.last_seen_s)
    if record.last_step is not None:
        found.step = record.last_step.step
    if (beat := record.heartbeat) is not None:
        found.step = max(found.step, beat.step)
        if beat.waiting_in:
            found.wait = Wait("", 0, beat.waiting_in, beat.waiting_since_s)
    if record.finished is not None:
        found.process = FINISHED if record.finished.exit_status == 0 else DEAD
        found.error = record.finished.error
    elif dead:
        found.process = DEAD
    elif record.closed:
        found.process = FINISHED
    return found


class _Freezer(pickle.Pickler):
    """Pickles everything but messages; those it lists."""

    def __init__(self, file: io.BytesIO, messages: list[Message]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._messages = messages

    def persistent_id(self, obj: Any) -> int | None:
        """Return a message's place in the list."""
        if not isinstance(obj, Message):
            return None
        self._messages.append(_own(obj))
        return len(self._messages) - 1


class _Thawer(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, messages: list[Message]) -> None:
        super().__init__(file)
        self._messages = messages

    def persistent_load(self, pid: Any) -> Message:
        """Return the message of that place."""
        return _own(self._messages[pid])


def _own(message: Message) -> Message:
    """Return a copy of the one kind of message that the state writes into, others as they are."""
    if not isinstance(message, pb.RunInfo):
        return message
    copied = pb.RunInfo()
    copied.CopyFrom(message)
    return copied


def _copy_of(batch: pb.Batch) -> pb.Batch:
    copied = pb.Batch()  # applying one cuts it
    copied.CopyFrom(batch)
    return copied


def _freeze(state: RunState) -> tuple[bytes, list[Message]]:
    file, messages = io.BytesIO(), []  # type: tuple[io.BytesIO, list[Message]]
    _Freezer(file, messages).dump(state)
    return file.getvalue(), messages


def _thaw(body: bytes, messages: list[Message]) -> RunState:
    state: RunState = _Thawer(io.BytesIO(body), messages).load()
    return state
