"""What each rank is doing now: its records, what its ledger says, and what the kernel says of its process."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterable
from dataclasses import dataclass, field

from distui.core.paths import RunFolder
from distui.core.telemetry.ledger import RECENT, CollectiveEntry, LedgerReader, LedgerState, LedgerUnreadable
from distui.daemon.processes import DEAD, RUNNING, STOPPED, process_state
from distui.daemon.state import RankRecord, RunState

FINISHED = "finished"
SILENT_S = 30.0
"""A rank of another node that has not been heard for so long counts as dead."""


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


def group_members(group: str) -> frozenset[int] | None:
    """Return the ranks in the brackets of a group's name: `tp[0,1]`, `dp[0-6:2]`, `world[0>1]`; None: not said."""
    _, found, text = group.rstrip("]").partition("[")
    if not found or ".." in text or "any" in text:
        return None
    try:
        if "-" in text:
            ends, _, step = text.partition(":")
            first, _, last = ends.partition("-")
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


def this_node() -> str:
    """Return the name by which sources of this node call it."""
    return sockets.gethostname()


def observe(state: RunState, now_s: float) -> list[Observed]:
    """Return all ranks that were heard of, by number."""
    return [_observe(state.run, state.ranks[rank], now_s, state.final) for rank in sorted(state.ranks)]


def launcher_alive(state: RunState, now_s: float) -> bool:
    """Tell whether the launcher of the run is there; False where it was never heard."""
    if state.launcher is None:
        return False
    if state.launcher.node != this_node():
        return now_s - state.launcher.last_seen_s < SILENT_S
    return process_state(state.launcher.pid, state.launcher.began_s) != DEAD


def _observe(run: RunFolder, record: RankRecord, now_s: float, final: bool) -> Observed:
    found = Observed(record.rank, record.node, record.pid, RUNNING, last_seen_s=record.last_seen_s)
    found.plain = record.started is None
    if record.last_step is not None:
        found.step = record.last_step.step
    if record.heartbeat is not None:
        beat = record.heartbeat
        found.step = max(found.step, beat.step)
        found.phase, found.phase_since_s = beat.phase, beat.phase_since_s
        found.last_seq = dict(beat.last_seq)
        found.wait = _parse_wait(beat.waiting_in, beat.waiting_since_s)
    if record.node == this_node():
        if not final:
            _read_ledger(run, record, found)
        found.process = process_state(record.pid, record.began_s)
    elif now_s - record.last_seen_s > SILENT_S:
        found.process = DEAD
    exit_status = None
    if record.finished is not None:
        exit_status, found.error = record.finished.exit_status, record.finished.error
    elif found.ledger is not None and found.ledger.ended_s is not None:
        exit_status = found.ledger.exit_status
    if record.closed and found.process == DEAD:
        found.process = FINISHED
    if exit_status is not None:
        found.told = True
        found.process = FINISHED if exit_status == 0 else DEAD
        found.error = found.error or (f"exit status {exit_status}" if exit_status else "")
    return found


def _read_ledger(run: RunFolder, record: RankRecord, found: Observed) -> None:
    """Take in the rank's ledger: newer than any heartbeat, and there when the process is stopped or wedged."""
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
    if not seq.isdigit():
        return Wait("", 0, op, since_s) if op else None
    return Wait(group, int(seq), op, since_s)


__all__ = ["DEAD", "FINISHED", "RUNNING", "STOPPED", "Observed", "Wait", "entries_at", "launcher_alive", "observe"]
