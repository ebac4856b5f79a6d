"""Says what is wrong with a run, and who is to blame: a dead rank, a hang.

Hang: no rank has made progress for its allowance. Each rank that waits in collective (group, seq) points at the
members of the group that have not entered it; the culprit is the one pointed at that itself waits for nobody. Where
there is none, ranks wait for each other in a circle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distui.core.telemetry.ledger import LedgerReader, LedgerState, LedgerUnreadable
from distui.daemon.rank import RankView
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from distui.daemon.state import RunState

HANG_AFTER_S = 5.0
HANG_AFTER_STEPS = 5.0
FIRST_STEP_S = 60.0
"""The first step compiles, opens files, warms up."""
LONG_PHASE_S = 300.0
LONG_PHASES = frozenset({"evaluation", "checkpoint", "idle"})
_FRESH_S = 5.0
_WAITING = re.compile(r"(?P<op>\S+) (?P<group>.+)#(?P<seq>\d+)$")


@dataclass(slots=True)
class _Place:
    """Where a rank stands: from its ledger where that can be read, else from its last heartbeat."""

    rank: int
    progress_s: float
    allowance_s: float
    fresh: bool
    phase: str
    phase_since_s: float
    last_seq: dict[str, int]
    op: str = ""
    group: str = ""
    seq: int = 0
    group_size: int = 0
    waiting_since_s: float = 0.0


def diagnose(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    """Return what is wrong with the run now; nothing where it is well."""
    dead = _dead_ranks(state, now_s)
    if dead or state.is_final():
        return dead  # who died first outranks whatever the others wait for
    return _hang(state, now_s)


def _dead_ranks(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    if state.info.state == "failed":
        lost = [view for view in state.ranks.values() if view.finished is None]
        if state.failed_rank is not None:
            lost = [view for view in lost if view.rank == state.failed_rank]
        return [_dead_rank(state, view, max(0.0, state.info.finished_s - view.last_seen_s)) for view in lost]
    if state.is_final():
        return []
    lost = [view for view in state.ranks.values() if view.finished is None and not view.alive]
    lost.sort(key=lambda view: view.died_s or 0.0)
    return [_dead_rank(state, view, max(0.0, now_s - (view.died_s or now_s))) for view in lost]


def _dead_rank(state: RunState, view: RankView, since_s: float) -> pb.Diagnosis:
    log = state.run.rank_log(view.rank)
    message = (
        f"rank {view.rank} (pid {view.pid} on {view.node or 'n/a'}) ended without a word after step {view.step()}; "
        f"the others cannot go on without it. Look at {log}"
    )
    return pb.Diagnosis(kind="dead_rank", ranks=[view.rank], since_s=since_s, message=message)


def allowance_s(view: RankView, phase: str | None = None) -> float:
    """Return for how long the rank may make no progress before that is a hang."""
    if phase is None:
        phase = view.heartbeat.phase if view.heartbeat is not None else ""
    allowed_s = max(HANG_AFTER_S, HANG_AFTER_STEPS * view.p99_step_s())
    if view.step() == 0:
        allowed_s = max(allowed_s, FIRST_STEP_S)
    return max(allowed_s, LONG_PHASE_S) if phase in LONG_PHASES else allowed_s


def _hang(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    live = [view for view in state.ranks.values() if view.finished is None]
    since_s = state.watched_since_s
    # By what has been heard; only if that looks like a hang are the ledgers opened.
    if not live or any(now_s - max(view.progress_s, since_s) <= allowance_s(view) for view in live):
        return []
    places = {view.rank: _place(state, view, now_s) for view in live}
    if any(now_s - max(place.progress_s, since_s) <= place.allowance_s for place in places.values()):
        return []
    if not any(place.fresh for place in places.values()):
        return []  # nobody speaks and no ledger can be read: the stream is broken, the job may be well
    return [_verdict(state, places, now_s)]


def _verdict(state: RunState, places: dict[int, _Place], now_s: float) -> pb.Diagnosis:
    waiting = {rank: place for rank, place in places.items() if place.seq}
    missing = {rank: _missing(state, place, places) for rank, place in waiting.items()}
    pointed_at = set().union(*missing.values()) if missing else set()
    sinks = sorted(rank for rank in pointed_at if not missing.get(rank))
    if not waiting:
        since_s = now_s - max(place.progress_s for place in places.values())
        doing = "; ".join(_doing(state, rank, places, now_s) for rank in sorted(places)[:4])
        return pb.Diagnosis(
            kind="hang",
            ranks=sorted(places),
            since_s=since_s,
            message=f"no progress for {since_s:.0f} s, and no rank waits in a collective: {doing}. {_advice(state)}",
        )
    if sinks:
        # The collective that the culprits keep others from: the one waited in for longest.
        first = min(
            (place for rank, place in waiting.items() if missing[rank] & set(sinks)), key=lambda p: p.waiting_since_s
        )
        who = [rank for rank in sinks if rank in missing[first.rank]] or sinks
        doing = "; ".join(_doing(state, rank, places, now_s) for rank in who[:4])
        text = f"{_ranks(who)} not entered {first.op} {first.group}#{first.seq}, in which"
        others = sorted(rank for rank in waiting if waiting[rank].group == first.group)
        text = f"{text} {_names(others)} waited for {now_s - first.waiting_since_s:.0f} s: {doing}"
        stopped = [rank for rank in who if rank in state.ranks and state.ranks[rank].stopped]
        if stopped:
            pids = " ".join(str(state.ranks[rank].pid) for rank in stopped)
            return _diagnosis(first, who, now_s, f"{text}. Let it go on: kill -CONT {pids}")
        return _diagnosis(first, who, now_s, f"{text}. {_advice(state)}")
    first = min(waiting.values(), key=lambda place: place.waiting_since_s)
    if pointed_at:
        edges = "; ".join(
            f"rank {rank} in {place.op} {place.group}#{place.seq} for {_list(sorted(missing[rank]))}"
            for rank, place in sorted(waiting.items())
            if missing[rank]
        )
        text = f"ranks wait for each other in a circle: {edges}. Their collectives are in different orders. "
        return _diagnosis(first, sorted(pointed_at), now_s, text + _advice(state))
    text = (
        f"all ranks have entered {first.op} {first.group}#{first.seq} and none has left it for "
        f"{now_s - first.waiting_since_s:.0f} s: the transport between them is broken, or sizes differ. "
    )
    return _diagnosis(first, sorted(waiting), now_s, text + _advice(state))


def _missing(state: RunState, place: _Place, places: dict[int, _Place]) -> set[int]:
    """Return the members of the group that have not entered the collective that `place` waits in."""
    whole = place.group == "world" or (place.group_size and place.group_size == state.info.world_size)
    found = {
        rank
        for rank, other in places.items()
        if rank != place.rank
        and (whole or place.group in other.last_seq)
        and other.last_seq.get(place.group, 0) < place.seq
    }
    if whole:
        found |= {rank for rank, view in state.ranks.items() if view.finished is not None}
    return found


def _place(state: RunState, view: RankView, now_s: float) -> _Place:
    beat = view.heartbeat if view.heartbeat is not None else pb.Heartbeat()
    place = _Place(
        view.rank,
        view.progress_s,
        allowance_s(view),
        now_s - view.heartbeat_s < _FRESH_S,
        beat.phase,
        beat.phase_since_s,
        dict(beat.last_seq),
        waiting_since_s=beat.waiting_since_s,
    )
    if match := _WAITING.match(beat.waiting_in):
        place.op, place.group, place.seq = match["op"], match["group"], int(match["seq"])
    ledger = read_ledger(state, view)
    if ledger is None:
        return place
    found, newest_s = ledger
    if found.step != view.step() or found.last_seq != place.last_seq or found.phase_since_s != beat.phase_since_s:
        place.progress_s = max(place.progress_s, newest_s, found.phase_since_s, found.waiting_since_s)
    place.fresh = True
    place.phase, place.phase_since_s, place.last_seq = found.phase, found.phase_since_s, found.last_seq
    place.allowance_s = allowance_s(view, found.phase)
    waiting = found.waiting
    place.op, place.group, place.seq, place.group_size = (
        (waiting.op, waiting.group, waiting.seq, waiting.group_size) if waiting else ("", "", 0, 0)
    )
    place.waiting_since_s = found.waiting_since_s
    return place


def read_ledger(state: RunState, view: RankView) -> tuple[LedgerState, float] | None:
    """Return what a rank's ledger says and when its newest collective was entered; None where there is none of it."""
    try:
        with LedgerReader.open(state.run.rank_ledger(view.rank)) as reader:
            newest = reader.entry(reader.head())
            found = reader.state()
    except (OSError, LedgerUnreadable):
        return None
    return (found, newest.enqueued_s if newest is not None else 0.0) if found.pid == view.pid else None


def _diagnosis(place: _Place, ranks: list[int], now_s: float, message: str) -> pb.Diagnosis:
    return pb.Diagnosis(
        kind="hang",
        ranks=ranks,
        collective=place.op,
        group=place.group,
        seq=place.seq,
        since_s=max(0.0, now_s - place.waiting_since_s),
        message=message,
    )


def _doing(state: RunState, rank: int, places: dict[int, _Place], now_s: float) -> str:
    if rank not in places:
        return f"rank {rank} has ended"
    if state.ranks[rank].stopped:
        return f"rank {rank} (pid {state.ranks[rank].pid}) is stopped by a signal"
    place = places[rank]
    if not place.phase_since_s:
        return f"rank {rank} has said nothing of its phase"
    return f"rank {rank} has been in {place.phase or 'n/a'} for {now_s - place.phase_since_s:.0f} s"


def _advice(state: RunState) -> str:
    return f"See where: distui control {state.run.run_id} stacks"


def _list(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"{shown}, ... ({len(ranks)})" if len(ranks) > 8 else shown


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {_list(ranks)} have"


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {_list(ranks)} have"
