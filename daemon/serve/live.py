"""The runs that this daemon holds: opened from disk when someone asks or publishes, kept while anybody cares."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from distui.core.errors import UserError
from distui.core.paths import RunFolder, check_run_id, default_runs_dir
from distui.core.telemetry.endpoint import read_secret, write_secret
from distui.core.telemetry.kinds import WARNINGS
from distui.daemon.diagnosis.drifts import loss_rise
from distui.daemon.diagnosis.observe import launcher_alive, this_node
from distui.daemon.node.clock import Clock
from distui.daemon.node.processes import DEAD, clock_was_set
from distui.daemon.runs.batches import DAEMON
from distui.daemon.runs.folders import FINAL_STATES, choose_run
from distui.daemon.runs.index import RunIndex
from distui.daemon.runs.snapshot import load_state, take_snapshot
from distui.daemon.runs.state import RunState
from distui.daemon.runs.store import RunLog
from distui.daemon.runs.unsent import Unsent
from distui.proto import telemetry_pb2 as pb

KEEP_S = 60.0
"""A run that has ended is kept in memory for so long after it was last used."""
WEIGHTY: frozenset[str | None] = frozenset({"event", "run_started", "run_finished", "rank_started", "rank_finished"})
"""Records that are on the disk before they are acknowledged, and seen at once."""
RETRY_S = 5.0
"""A log that cannot be written is tried again so often."""
FRESH_S = 0.2
"""Watchers that ask within this time share one snapshot."""
MANY_FRESH_S = 0.5
"""The same of a job that is rolled up, whose nodes tell once a second."""

CALM_S = 10.0
"""Slowness that comes back within this time is one episode."""
_COME_AND_GO = WARNINGS | {"nan_loss"}
"""A bad batch now and then is one episode, not one each time."""
_FINAL_KINDS = frozenset({"dead_rank", "out_of_memory", "left_early", "mismatch"})

_log = logging.getLogger("distui.daemon")


Key = tuple[str, tuple[int, ...], str]
"""An episode: kind, ranks, group. Not the sequence number, which goes on while a job is only slow."""


@dataclass(slots=True)
class _Episode:
    began_s: float
    seen_s: float
    words: str


class LiveRun:
    """One run in memory and, once somebody publishes, its log opened for writing."""

    def __init__(self, state: RunState, incarnation: int) -> None:
        self.state = state
        self.num_watchers = self.num_publishers = 0
        self._kept = False
        """Whether somebody has published: only then is what the daemon itself says of the run written too."""
        self.used_s = time.monotonic()
        self._log: RunLog | None = None
        self._unsent = Unsent(state.run)
        self._broken_s: float | None = None
        """Since when nothing can be written; None where all is well. Units: monotonic seconds."""
        self._num_lost = 0
        self._own = pb.Source(rank=DAEMON, node=this_node(), pid=os.getpid(), incarnation=incarnation)
        self._own_seq = state.kept_seq(self._own)
        self._resumed = state.kept_by_others(self._own)
        self._snapshot = pb.Snapshot()
        self._snapshot_s = 0.0
        self._told: dict[Key, _Episode] = {}
        self._told_rise = 0
        self._spoilt = False
        """Whether it could not be judged, which is told once."""
        self._clock = Clock()
        self.on_batch: Callable[[pb.Batch], None] | None = None
        """Hears of each batch that is taken in."""

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return self.state.run

    def keep(self, batch: pb.Batch) -> bool:
        """Write what a source has published, as far as it is new, and take it in; tell whether a record has weight."""
        self._kept = True
        return self._take(batch)

    def _take(self, batch: pb.Batch) -> bool:
        self.used_s = time.monotonic()
        if not self.state.only_new(batch):
            return False
        self._write(batch)
        kinds = self.state.apply(batch, time.time())
        if self.on_batch is not None:
            self.on_batch(batch)
        if self._resumed and not self.state.final:
            self._resumed = False
            event = pb.Event(level=pb.Event.WARNING, kind="daemon_restarted", message="the daemon was started again")
            self.say(pb.Record(event=event))
        weighty = not WEIGHTY.isdisjoint(kinds)
        if weighty:
            self._snapshot_s = 0.0  # who asks next sees it
        return weighty

    def _write(self, batch: pb.Batch) -> None:
        if not self._kept:
            return  # whoever looks at a run changes nothing in its folder
        if self._broken_s is not None and time.monotonic() - self._broken_s < RETRY_S:
            self.state.lose(len(batch.records))
            self._num_lost += len(batch.records)
            return
        try:
            if self._log is None:
                self._log = RunLog(self.run)
            self._log.append(batch)
        except OSError as error:
            self.state.lose(len(batch.records))
            self._num_lost += len(batch.records)
            self._give_up(error)
            return
        if self._broken_s is not None:
            self._broken_s = None
            message = f"the telemetry of this run is kept again; {self._num_lost} records are missing on the disk"
            self._num_lost = 0
            self._note(pb.Event(level=pb.Event.INFO, kind="telemetry_resumed", message=message))

    def _give_up(self, error: OSError) -> None:
        """Go on in memory only: a full disk costs the post-mortem, neither the job nor the daemon."""
        told, self._broken_s = self._broken_s is not None, time.monotonic()
        if self._log is not None:
            self._log.abandon()
            self._log = None
        if told:
            return
        message = f"the telemetry of this run is no longer kept in {self.run.telemetry}: {error}"
        self._note(pb.Event(level=pb.Event.ERROR, kind="telemetry_stopped", message=message))

    def _note(self, event: pb.Event) -> None:
        """Show an event that may not reach the disk."""
        _log.warning("%s: %s", self.run.run_id, event.message)
        self.state.events.append(pb.TimedEvent(time_s=time.time(), rank=DAEMON, event=event))

    def say(self, record: pb.Record) -> None:
        """Add a record of the daemon's own."""
        self._own_seq += 1
        record.seq, record.time_s = self._own_seq, time.time()
        self._take(pb.Batch(run_id=self.run.run_id, run_dir=str(self.run.path), source=self._own, records=[record]))

    def flush(self) -> None:
        """Have the disk keep what was written."""
        if self._log is not None and self._log.dirty:
            try:
                self._log.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush and close the log."""
        self.flush()
        if self._log is not None:
            try:
                self._log.close()
            except OSError as error:
                _log.error("%s: closing its log: %s", self.run.run_id, error)
            self._log = None

    def snapshot(self) -> pb.Snapshot:
        """Return the run as it is now. Do not change it: watchers share it."""
        now = time.monotonic()
        fresh_s = FRESH_S if self.state.many is None else MANY_FRESH_S
        if now - self._snapshot_s >= fresh_s or not self._snapshot_s:
            self._unsent.take_into(self.state)
            if jumped_s := self._clock.jumped_s():
                self._clock_jumped(jumped_s)
            self._snapshot, self._snapshot_s = self._look(), now
            self._tell(self._snapshot)
            self._tell_rise()
        return self._snapshot

    def _look(self) -> pb.Snapshot:
        """Judge the run."""
        try:
            return take_snapshot(self.state, time.time())
        except Exception as error:  # noqa: BLE001  whatever its records hold, the other runs keep their daemon
            if not self._spoilt:
                _log.exception("%s cannot be judged", self.run.run_id)
            self._spoilt = True
            found = pb.Snapshot(run=self.state.info, dropped=self.state.dropped)
            found.run.message = f"the daemon cannot judge this run: {type(error).__name__}: {error}"
            return found

    def _tell_rise(self) -> None:
        """Say that the loss rose with the learning rate, which is nothing wrong."""
        step, message = loss_rise(self.state)
        if step and step != self._told_rise and not self.state.final:
            self.say(pb.Record(event=pb.Event(level=pb.Event.INFO, kind="loss_rise", message=message)))
        self._told_rise = step or self._told_rise

    def _clock_jumped(self, jumped_s: float) -> None:
        """Count from now on what waits: since when, was told by a clock that is no more."""
        clock_was_set()
        self.state.clock_set_s = time.time()
        if not self.state.final:
            message = (
                f"the clock of {this_node()} jumped by {jumped_s:+.0f} s: it was set, or the machine was suspended"
            )
            self.say(pb.Record(event=pb.Event(level=pb.Event.WARNING, kind="clock_jump", message=message)))

    def _tell(self, snapshot: pb.Snapshot) -> None:
        """Say what is wrong once an episode: when it begins, when its words have changed for good, and when it is over.

        The words of a rank that died, say, change once the launcher has told what it died of.
        """
        present, now_s = {}, time.time()
        for found in snapshot.diagnosis:
            key = (found.kind, tuple(found.ranks), found.group)
            present[key] = found
            episode = self._told.get(key)
            if episode is None:
                self._told[key] = episode = _Episode(now_s - found.since_s, now_s, _constant(found.message))
            elif key[0] not in _FINAL_KINDS or _constant(found.message) == episode.words:
                episode.seen_s = now_s
                continue
            episode.seen_s, episode.words = now_s, _constant(found.message)
            attributes = _about(key) | {"since_s": f"{found.since_s:.1f}"}
            if found.seq:
                attributes["seq"] = str(found.seq)
            if found.collective:
                attributes["collective"] = found.collective
            event = pb.Event(level=_level(found.kind), kind=found.kind, message=found.message, attributes=attributes)
            self.say(pb.Record(event=event))
        for key, episode in list(self._told.items()):
            if key in present or (now_s - episode.seen_s < CALM_S and key[0] in _COME_AND_GO):
                continue
            del self._told[key]
            if snapshot.run.state not in FINAL_STATES:
                message = f"the {key[0]} is over after {now_s - episode.began_s:.0f} s"
                event = pb.Event(level=pb.Event.INFO, kind=f"{key[0]}_over", message=message, attributes=_about(key))
                self.say(pb.Record(event=event))

    def ended(self) -> bool:
        """Tell whether nothing more is to come: it has ended, or nobody is left who could say how."""
        return self.snapshot().run.state in FINAL_STATES

    def alive(self) -> bool:
        """Tell whether it is unfinished and some process of it lives."""
        if self.ended():
            return False
        ranks = self.snapshot().ranks
        return launcher_alive(self.state, time.time()) or any(rank.state not in (DEAD, "finished") for rank in ranks)


def _about(key: Key) -> dict[str, str]:
    """Return what tells an episode from others of its kind, as an event's attributes."""
    _, ranks, group = key
    return {"ranks": ",".join(map(str, ranks)), **({"group": group} if group else {})}


def _constant(message: str) -> str:
    """Return a verdict's words without its numbers, which change from one look to the next."""
    return re.sub(r"[0-9][0-9.,]*", "", message)


def _level(kind: str) -> pb.Event.Level:
    return pb.Event.WARNING if kind in WARNINGS else pb.Event.ERROR


_PARENTS = "run_folders"


def _remembered() -> set[Path]:
    try:
        return {path for line in read_secret(_PARENTS).decode().splitlines() if (path := Path(line)).is_dir()}
    except (OSError, UserError):
        return set()  # the first daemon of this user


class LiveRuns:
    """All runs in memory, by folder. Used on one event loop."""

    def __init__(self) -> None:
        self.runs: dict[Path, LiveRun] = {}
        self.incarnation = time.time_ns()
        self._parents = _remembered()
        self._index = RunIndex()
        self._opening: dict[Path, asyncio.Lock] = {}
        self.ask: Callable[[str, str], Awaitable[pb.Snapshot | None]] | None = None
        """Asks the daemon of a node, below this one, what it knows of a run."""

    async def open(self, folder: RunFolder) -> LiveRun:
        """Return the run of a folder, read from disk where it is not in memory."""
        found = self.runs.get(folder.path)
        if found is None:
            async with self._opening.setdefault(folder.path, asyncio.Lock()):
                found = self.runs.get(folder.path)
                if found is None:
                    state = await asyncio.to_thread(load_state, folder)
                    found = self.runs[folder.path] = LiveRun(state, self.incarnation)
                    self._remember(folder.path.parent)
            self._opening.pop(folder.path, None)
        found.used_s = time.monotonic()
        return found

    def _remember(self, parent: Path) -> None:
        """Note a folder that runs are kept in, so that they are found also by the next daemon."""
        if parent in self._parents or parent == default_runs_dir().resolve():
            return
        self._parents.add(parent)
        try:
            write_secret(_PARENTS, "".join(f"{path}\n" for path in sorted(self._parents)))
        except (OSError, UserError) as error:
            _log.warning("the next daemon will not know of the runs in %s: %s", parent, error)

    def folders(self) -> list[RunFolder]:
        """Return the runs that are known, in memory and on disk, newest first."""
        listed = self._index.folders({default_runs_dir().resolve(), *self._parents})
        others = [live for path, live in list(self.runs.items()) if not self._index.has(path)]
        others.sort(key=lambda live: live.state.info.started_s, reverse=True)
        return [live.run for live in others] + listed

    async def find(self, name: str) -> LiveRun:
        """Return a run by its id or the beginning of one, never by a path; "" is the newest. Raises: UserError."""
        if name:
            check_run_id(name)
        for live in self.runs.values():
            if name and live.run.run_id == name:
                return await self.open(live.run)
        folders = await asyncio.to_thread(self.folders)
        return await self.open(choose_run(name, folders, "known to the daemon"))

    def tick(self) -> None:
        """Look after every run: what is wrong with it, and whether it is still needed."""
        now = time.monotonic()
        for path, live in list(self.runs.items()):
            if not live.ended():  # which looks at it
                continue
            if not live.num_watchers and not live.num_publishers and now - live.used_s > KEEP_S:
                live.close()
                del self.runs[path]

    def flush(self) -> None:
        """Have the disk keep what was written."""
        for live in list(self.runs.values()):
            live.flush()

    def close(self) -> None:
        """Flush and close every log."""
        for live in self.runs.values():
            live.close()

    def num_publishers(self) -> int:
        """Return how many sources have a stream open."""
        return sum(live.num_publishers for live in self.runs.values())

    def num_watchers(self) -> int:
        """Return how many watch."""
        return sum(live.num_watchers for live in self.runs.values())
