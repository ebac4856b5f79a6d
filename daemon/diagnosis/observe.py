"""What each rank is doing now: its records, what its ledger says, and what the kernel says of its process."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from distui.core.paths import RunFolder
from distui.core.telemetry.ledger import RECENT, CollectiveEntry, LedgerReader, LedgerState, LedgerUnreadable
from distui.daemon.node.processes import DEAD, RUNNING, STOPPED, process_state
from distui.daemon.runs.batches import MAX_DIGITS, MAX_RANKS
from distui.daemon.runs.state import RankRecord, RunState

FINISHED = "finished"
SILENT_S = 30.0
"""A rank of another node that has not been heard for so long counts as dead."""


LATE_S = 1.0
"""Who waits for so long may wait for a rank of which nothing has come yet."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A collective that a rank's main thread is blocked in, and since when."""

    group: str
    seq: int
    op: str
    since_s: float

    def text(self) -> str:
        """Return `all_reduce #17 of data_parallel`."""
        return f"{self.op} #{self.seq} of {self.group}"

    def has(self, rank: int) -> bool:
        """Tell whether a rank takes part, as far as the group's name says."""
        members = group_members(self.group)
        return members is None or rank in members


@lru_cache(maxsize=1024)
def group_members(group: str) -> frozenset[int] | None:
    """Return the ranks in the brackets of a group's name: `tp[0,1]`, `dp[0-6:2]`, `world[0>1]`; None: not said."""
    _, found, text = group.rstrip("]").partition("[")
    if not found or ".." in text or "any" in text:
        return None
    try:
        if "-" in text:
            ends, _, step = text.partition(":")
            first, _, last = ends.partition("-")
            if int(last) >= MAX_RANKS:
                return None  # a name that lies, or was cut off, would cost memory by the rank
            return frozenset(range(int(first), int(last) + 1, int(step or 1)))
        return frozenset(int(rank) for rank in text.replace(">", ",").split(","))
    except ValueError:
        return None


@dataclass(slots=True)
class Observed:
    """One rank now. `process` is running, stopped, dead or finished."""

    rank: int
    node: str
    pid: int
    process: str
    step: int = 0
    phase: str = ""
    phase_since_s: float = 0.0
    wait: Wait | None = None
    last_seq: dict[str, int] = field(default_factory=dict)
    last_seen_s: float = 0.0
    error: str = ""
    num_collectives: int = 0
    plain: bool = False
    """Whether it runs without an engine, so that it tells of no steps."""
    told: bool = False
    """Whether it has said itself how it ended."""
    ledger: LedgerState | None = None
    began_s: float = 0.0
    busy: str = ""
    """What it does while others wait for it, where it is at work."""


def this_node() -> str:
    """Return the name by which sources of this node call it."""
    return sockets.gethostname()


def observe(state: RunState, now_s: float) -> list[Observed]:
    """Return all ranks that were heard of, by number; once one is dead, also those that only left a ledger."""
    found = [_observe(state, state.ranks[rank], now_s) for rank in sorted(state.ranks)]
    missed = len(found) < state.world_size() and any(
        rank.process == DEAD or (rank.wait is not None and now_s - rank.wait.since_s > LATE_S) for rank in found
    )
    if state.final or not missed or state.run.node:  # of a job that is rolled up, others' ledgers may be seen
        return found
    # Whose first batch has not come is not known: it may be who died, or who is waited for on a full machine.
    silent = [rank for rank in range(state.world_size()) if rank not in state.ranks and _meet(state, rank)]
    found += [_observe(state, state.ranks[rank], now_s) for rank in silent]
    return sorted(found, key=lambda rank: rank.rank)


def _meet(state: RunState, rank: int) -> bool:
    """Take in that a rank exists, from its ledger on this node; False where it has none."""
    try:
        with LedgerReader.open(state.run.rank_ledger(rank)) as reader:
            state.ranks[rank] = RankRecord(rank, this_node(), reader.pid, reader.incarnation)
    except (OSError, LedgerUnreadable):
        return False  # it never came so far, or runs on another node
    return True


def launcher_alive(state: RunState, now_s: float) -> bool:
    """Tell whether the launcher of the run is there; False where it was never heard."""
    if state.launcher is None:
        return False
    if state.launcher.node != this_node():
        return not _silent(state, state.launcher, now_s)
    return process_state(state.launcher.pid, state.launcher.began_s) != DEAD


def _silent(state: RunState, record: RankRecord, now_s: float) -> bool:
    """Tell whether a source of another node, whose clock may be another, has not been heard for long."""
    return now_s - max(record.heard_s or record.last_seen_s, state.clock_set_s) > SILENT_S


def _observe(state: RunState, record: RankRecord, now_s: float) -> Observed:
    found = Observed(record.rank, record.node, record.pid, RUNNING, last_seen_s=record.last_seen_s)
    found.plain, found.began_s = record.started is None, record.began_s
    if record.last_step is not None:
        found.step = record.last_step.step
    if record.heartbeat is not None:
        beat = record.heartbeat
        found.step = max(found.step, beat.step)
        found.phase, found.phase_since_s = beat.phase, beat.phase_since_s
        found.last_seq = dict(beat.last_seq)
        found.wait = _parse_wait(beat.waiting_in, beat.waiting_since_s)
    if record.node == this_node():
        _read_ledger(state.run, record, found, state.final)
        found.process = process_state(record.pid, record.began_s)
    elif _silent(state, record, now_s):
        found.process = DEAD
    exit_status = None
    if record.finished is not None:
        exit_status, found.error = record.finished.exit_status, record.finished.error
    elif found.ledger is not None and found.ledger.ended_s is not None:
        exit_status, found.error = found.ledger.exit_status, found.ledger.error
    if record.closed and found.process == DEAD:
        found.process = FINISHED
    if exit_status is not None:
        found.told = True
        found.process = FINISHED if exit_status == 0 else DEAD
        found.error = found.error or (f"exit status {exit_status}" if exit_status else "")
    if found.wait is not None and not state.clock_set_s <= found.wait.since_s <= now_s and state.clock_set_s:
        found.wait = replace(found.wait, since_s=state.clock_set_s)  # it began by a clock that is no more
    return found


def _read_ledger(run: RunFolder, record: RankRecord, found: Observed, final: bool) -> None:
    """Take in the rank's ledger: newer than any heartbeat, and there when the process is stopped or wedged.

    Once the run has ended only how the rank did counts: where it was is what the launcher's signal made of it.
    """
    try:
        with LedgerReader.open(run.rank_ledger(record.rank)) as reader:
            if reader.incarnation != record.incarnation:
                return
            state = reader.state()
            held_up = reader.held_up() if state.waiting is None else None
    except (OSError, LedgerUnreadable):
        return  # not on this disk, or the telemetry's ledger is kept in memory only: the heartbeat has to do
    found.ledger = state
    found.step = max(found.step, state.step)
    if final:
        return
    found.phase, found.phase_since_s = state.phase, state.phase_since_s
    found.last_seq = dict(state.last_seq)
    found.num_collectives = sum(state.last_seq.values())
    entry = state.waiting
    found.wait = None
    if entry is not None and not entry.finished_s:
        found.wait = Wait(entry.group, entry.seq, entry.op, state.waiting_since_s)
    elif held_up is not None:  # somebody waits for it below Python, or will soon
        found.wait = Wait(held_up.group, held_up.seq, held_up.op, held_up.enqueued_s)


def entries_at(run: RunFolder, group: str, seq: int, ranks: Iterable[Observed]) -> dict[int, CollectiveEntry]:
    """Return what the ranks of this node brought to one collective, from their ledgers."""
    found = {}
    for rank in ranks:
        if rank.ledger is None:
            continue
        try:
            with LedgerReader.open(run.rank_ledger(rank.rank)) as reader:
                for entry in reader.entries(reader.head() - RECENT):
                    if entry.group == group and entry.seq == seq:
                        found[rank.rank] = entry
        except (OSError, LedgerUnreadable):
            continue  # replaced since: the rank is starting again
    return found


def _parse_wait(text: str, since_s: float) -> Wait | None:
    """Read a heartbeat's `all_reduce data_parallel#17`."""
    op, _, place = text.partition(" ")
    group, _, seq = place.rpartition("#")
    if not seq.isdecimal() or len(seq) > MAX_DIGITS:
        return Wait("", 0, op, since_s) if op else None
    return Wait(group, int(seq), op, since_s)


__all__ = ["DEAD", "FINISHED", "RUNNING", "STOPPED", "Observed", "Wait", "entries_at", "launcher_alive", "observe"]
