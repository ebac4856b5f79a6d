"""Ranks that wait for each other: hangs, data stalls and mismatches, with where the culprit is.

A rank waits in a collective (group, sequence number) for those of its group that have not entered it. The culprit is
who is waited for and waits for none; a stopped process is one whatever the ranks say. A culprit that is at work, by its
stack or by what the kernel says of it (`busy.py`), gets more time. One that has ended is named as that.
"""

from __future__ import annotations

from distui.core.paths import RunFolder
from distui.core.telemetry.kinds import FOR_A_PERSON
from distui.core.telemetry.stacks import KnownStack, known_stack
from distui.daemon.diagnosis.busy import BUSY_S, LOADER, PATIENT_PHASES, PATIENT_S, at_work, note_all, stuck_since
from distui.daemon.diagnosis.collectives import compare
from distui.daemon.diagnosis.observe import (
    DEAD,
    FINISHED,
    STOPPED,
    Observed,
    Wait,
    entries_at,
    group_members,
    this_node,
)
from distui.daemon.diagnosis.where import own_place, text_of, traced_frames
from distui.daemon.node.processes import traced_by
from distui.daemon.runs.state import RunState
from distui.proto import telemetry_pb2 as pb

HANG_S = 4.5
WARM_COLLECTIVES = 10
"""A rank that tells of no steps is past its first one after so many collectives."""
HANG_STEPS = 5.0
LOCK_S = 10.0
"""Threads that wait for each other for less may be a loader's that is slow."""
DISAGREE_S = 1.0
"""What ranks bring to a collective is compared once they have waited there for so long."""
_NAMED = 8


def allowance_s(state: RunState, ranks: list[Observed]) -> float:
    """Return for how long ranks may wait before it is called a hang.

    Longer before the first step (compilation, data) and while any rank evaluates or saves.
    """
    usual_s = max(HANG_S, HANG_STEPS * state.steps.p99_s())
    patient = any(_is_slow(rank) for rank in ranks if rank.process not in (DEAD, FINISHED))
    return max(usual_s, PATIENT_S) if patient else usual_s


def _is_slow(rank: Observed) -> bool:
    if rank.phase in PATIENT_PHASES:
        return True
    if rank.step:
        return False
    return rank.ledger is None or not rank.plain or rank.num_collectives < WARM_COLLECTIVES


def hang(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return who holds up the others, if anybody has waited for too long."""
    limit_s = allowance_s(state, ranks)
    stopped = [rank for rank in ranks if rank.process == STOPPED]
    for rank in stopped:
        tracer, name = traced_by(rank.pid)
        rank.busy = f"is held by a debugger ({name}, pid {tracer})" if tracer else ""
    stopped = [rank for rank in stopped if not rank.busy]
    if all(now_s - rank.last_seen_s <= HANG_S - 1 for rank in stopped):
        stopped = []  # one that is stopped for long names those that were stopped a moment later
    waiting = [
        rank
        for rank in ranks
        if rank.process not in (DEAD, FINISHED) and rank.wait is not None and now_s - rank.wait.since_s > limit_s
    ]
    if any(rank.wait is not None and now_s - rank.wait.since_s > DISAGREE_S for rank in ranks):
        note_all(state, ranks)
    if not waiting and not stopped:
        return _early_mismatch(state, ranks, now_s) or all_stuck(state, ranks, now_s)
    if stopped:
        others = [rank for rank in waiting if rank.process != STOPPED]
        return [_stopped(state, stopped, others, now_s)]
    found = _blame(state, ranks, waiting, now_s)
    return [found] if found is not None else []


def _early_mismatch(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """See whether those who wait, and not yet for too long, have brought different things: that never ends well."""
    waits = {
        (rank.wait.group, rank.wait.seq): rank.wait
        for rank in ranks
        if rank.wait is not None and rank.process not in (DEAD, FINISHED) and now_s - rank.wait.since_s > DISAGREE_S
    }
    for wait in waits.values():
        if (told := _disagree(state.run, ranks, wait, now_s - wait.since_s)) is not None:
            return [told]
    return []


def _stopped(state: RunState, stopped: list[Observed], waiting: list[Observed], now_s: float) -> pb.Diagnosis:
    pids = " ".join(str(rank.pid) for rank in stopped[:_NAMED])
    wait = waiting[0].wait if waiting else None
    others = waits(waiting, wait) if wait else ""
    since_s = max(now_s - min(rank.last_seen_s for rank in stopped), 0.0)
    known = _stack(state.run, stopped[0])
    place = f", last seen at {text_of(known.frames)}" if known is not None else ""
    return _told(
        stopped,
        wait,
        since_s,
        f"{names(stopped)} {_are(stopped)} stopped by a signal{place}{others}; to let go on: kill -CONT {pids}",
    )


def _blame(state: RunState, ranks: list[Observed], waiting: list[Observed], now_s: float) -> pb.Diagnosis | None:
    """Follow who waits for whom to those that are waited for and wait for none."""
    missing: dict[int, set[int]] = {}
    blocked = [rank for rank in ranks if rank.wait is not None and rank.process not in (DEAD, FINISHED)]
    for rank in blocked:  # also who waits not yet too long: it is held up like the others
        assert rank.wait is not None
        missing[rank.rank] = {other.rank for other in ranks if other is not rank and _lacks(other, rank.wait)}
    by_number = {rank.rank: rank for rank in ranks}
    waited_for = set().union(*missing.values())
    sinks = sorted(number for number in waited_for if not missing.get(number))
    first = min(waiting, key=lambda rank: rank.wait.since_s if rank.wait else now_s)
    assert first.wait is not None
    since_s = now_s - first.wait.since_s
    if sinks:
        left = [by_number[number] for number in sinks if by_number[number].process == FINISHED]
        blamed = {rank.rank for rank in left} or set(sinks)
        held = [rank for rank in blocked if missing[rank.rank] & blamed]
        # The collective that the culprit is missing in: the one that someone has waited for it in the longest.
        wait = min((rank.wait for rank in held if rank.wait), key=lambda one: one.since_s)
        if left:
            return left_early(left, held, wait, now_s - wait.since_s)
        waited_s = now_s - wait.since_s
        culprits = [by_number[number] for number in sinks]
        for rank in culprits:
            rank.busy = at_work(state, rank, wait, now_s)
        culprits = [rank for rank in culprits if not rank.busy]
        if not culprits:
            return None
        first_culprit = culprits[0]
        known = _stack(state.run, first_culprit)
        frames, how = _frames(state.run, first_culprit, known, now_s)
        stalls = first_culprit.phase == "data" or any(LOADER in frame for frame in frames)
        place = f", {how} {text_of(frames)}" if frames else ""
        phase = f"in {first_culprit.phase}" if first_culprit.phase else "in an unknown phase"
        step = f", after step {first_culprit.step}" if first_culprit.step else ""
        advice = (
            "look at its data: a worker that hangs, slow storage, or a batch that this rank does not get"
            if stalls
            else f"look at {own_place(frames)}"
            if frames
            else f"distui control {state.run.run_id} stacks shows where"
        )
        told = _told(
            culprits,
            wait,
            waited_s,
            f"{names(culprits)} {_have(culprits)} not entered {wait.text()} for {waited_s:.0f} s (last known {phase}"
            f"{step}{place}); {names(held)} wait{'s' * (len(held) == 1)} there; {advice}",
        )
        told.kind = "data_stall" if stalls else "hang"
        return told
    if waited_for:
        cycle = [by_number[number] for number in sorted(waited_for)]
        places = "; ".join(_place(state.run, rank, now_s) for rank in cycle[:_NAMED] if rank.wait)
        return _told(
            cycle,
            first.wait,
            since_s,
            f"ranks wait for each other in a circle: {places}; they call collectives in "
            "different orders: look for a branch, or an order of set or dict, that differs between ranks",
        )
    if (differs := _disagree(state.run, ranks, first.wait, since_s)) is not None:
        return differs
    joined_s = max(rank.wait.since_s for rank in blocked if rank.wait)
    if now_s - joined_s < HANG_S:
        return None  # the last has only just come
    return _all_joined(state, ranks, waiting, first.wait, since_s)


def left_early(left: list[Observed], held: list[Observed], wait: Wait, since_s: float) -> pb.Diagnosis:
    """Return that ranks have ended in good order where others still need them."""
    steps = sorted({rank.step for rank in left})
    after = f" after step {steps[0]}" if len(steps) == 1 else f" after steps {steps[0]} to {steps[-1]}"
    told = _told(
        left,
        wait,
        since_s,
        f"{names(left)} ended{after} while others wait: {names(held)} {_are(held)} in {wait.text()}, which needs "
        f"{'it' if len(left) == 1 else 'them'}; give all ranks as many batches, and let all leave the loop in the same "
        "step (a break or sys.exit that only one takes, data that does not divide)",
    )
    told.kind = "left_early"
    return told


def all_stuck(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """See whether no rank does anything and none waits in a collective: each waits for a lock, or its loader."""
    living = [rank for rank in ranks if rank.process not in (DEAD, FINISHED)]
    if not living or len(ranks) < state.world_size():
        return []
    if any(rank.wait is not None or rank.phase in FOR_A_PERSON for rank in living):
        return []
    limit_s = max(LOCK_S, allowance_s(state, ranks))
    known = {rank.rank: _since_clock(state, _stack(state.run, rank)) for rank in living}
    # First what costs nothing: a stack that another thread has just noted, and that has been the same for long.
    if any(one is None or one.time_s - one.since_s < limit_s or now_s - one.time_s > BUSY_S for one in known.values()):
        return []
    note_all(state, living)  # so that all are looked at for the same short time, not one after the other
    since = [stuck_since(rank, one, limit_s) for rank in living if (one := known[rank.rank]) is not None]
    if not all(since):
        return []
    stalls = all(any(LOADER in frame for frame in one.frames) for one in known.values() if one is not None)
    places = "; ".join(
        f"rank {rank.rank} at {text_of(one.frames)}"
        for rank in living[:_NAMED]
        if (one := known[rank.rank]) is not None
    )
    what = "wait for their data" if stalls else "wait for a lock"
    waits_ = what if len(living) > 1 else what.replace("wait", "waits").replace("their", "its")
    told = _told(
        living,
        None,
        now_s - max(since),
        f"no rank goes on: {names(living)} {waits_}, no processor is used, and none is in a collective: {places}",
    )
    told.kind = "data_stall" if stalls else "hang"
    return [told]


def _place(run: RunFolder, rank: Observed, now_s: float) -> str:
    known = _stack(run, rank)
    where = f" at {own_place(known.frames)}" if known is not None else ""
    return f"rank {rank.rank} in {rank.wait.text() if rank.wait else 'none'}{where}"


def _disagree(run: RunFolder, ranks: list[Observed], wait: Wait, since_s: float) -> pb.Diagnosis | None:
    """Compare what the ranks brought to the collective that they wait in."""
    entries = entries_at(run, wait.group, wait.seq, ranks)
    # Who comes last on a busy machine may be the one who makes the majority.
    size = max((one.group_size for one in entries.values()), default=0) if since_s < HANG_S else 0
    differs = compare(wait.group, wait.seq, {rank: (one.op, one.num_bytes) for rank, one in entries.items()}, size)
    if differs is None:
        return None
    blamed = [rank for rank in ranks if rank.rank in differs[3]]
    known = [(rank.rank, _stack(run, rank)) for rank in blamed[:_NAMED]]
    places = ", ".join(f"rank {rank} is at {own_place(stack.frames)}" for rank, stack in known if stack is not None)
    told = _told(
        blamed,
        wait,
        since_s,
        f"ranks disagree on #{wait.seq} of {wait.group}: {differs[4]}; {f'{places}; ' if places else ''}look for a "
        "branch that not all ranks take",
    )
    told.kind = "mismatch"
    return told


def _all_joined(
    state: RunState, ranks: list[Observed], waiting: list[Observed], wait: Wait, since_s: float
) -> pb.Diagnosis:
    stacks = f"distui control {state.run.run_id} stacks shows where"
    if (unseen := state.world_size() - len(ranks)) > 0:
        more = f"{unseen} other ranks are" if unseen > 1 else "one other rank is"
        what = f"{names(waiting)} wait in {wait.text()}; {more} not seen from here, and may be waited for; {stacks}"
    else:
        what = (
            f"all ranks have entered {wait.text()} and it does not end: the network or the backend is stuck; {stacks}"
        )
    return _told(waiting, wait, since_s, what)


def _stack(run: RunFolder, rank: Observed) -> KnownStack | None:
    return known_stack(run, rank.rank) if rank.node == this_node() else None


def _since_clock(state: RunState, known: KnownStack | None) -> KnownStack | None:
    return None if known is None else known._replace(since_s=max(known.since_s, state.clock_set_s))


def _frames(run: RunFolder, rank: Observed, known: KnownStack | None, now_s: float) -> tuple[tuple[str, ...], str]:
    """Return where the main thread is, or was last seen, and how that is known, in words."""
    if rank.node != this_node():
        return (), ""
    if known is not None and now_s - known.time_s < BUSY_S:
        return known.frames, "now at"
    # No other thread of it can run: C code holds the interpreter's lock, or the process is stopped.
    incarnation = rank.ledger.incarnation if rank.ledger else 0
    runs = rank.process not in (STOPPED, DEAD, FINISHED)
    if runs and (frames := traced_frames(run, rank.rank, rank.pid, incarnation, now_s)):
        return frames, "holding the interpreter's lock (GIL) at"
    return (known.frames, "last seen at") if known is not None else ((), "")


def _lacks(rank: Observed, wait: Wait) -> bool:
    """Tell whether a rank is of the group and has not entered the collective."""
    if not wait.has(rank.rank):
        return False
    if not wait.group:
        return rank.wait is None
    if rank.process == FINISHED and wait.group != "world" and wait.group not in rank.last_seq:
        return group_members(wait.group) is not None  # where nobody has told who is in it, it may never have been
    return rank.last_seq.get(wait.group, 0) < wait.seq


def _told(blamed: list[Observed], wait: Wait | None, since_s: float, message: str) -> pb.Diagnosis:
    told = pb.Diagnosis(kind="hang", ranks=[rank.rank for rank in blamed], since_s=max(0.0, since_s), message=message)
    if wait is not None:
        told.collective, told.group, told.seq = wait.op, wait.group, wait.seq
    return told


def names(ranks: list[Observed]) -> str:
    """Return `rank 3 on node1`, or `ranks 1, 2 and 5 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0].rank} on {ranks[0].node}"
    shown = ", ".join(str(rank.rank) for rank in ranks[:_NAMED])
    return f"ranks {shown}" + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def waits(ranks: list[Observed], wait: Wait) -> str:
    """Return `; ranks 0, 1 wait in all_reduce #17 of world`."""
    return f"; {names(ranks)} wait{'s' * (len(ranks) == 1)} in {wait.text()}"


def _are(ranks: list[Observed]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _have(ranks: list[Observed]) -> str:
    return "has" if len(ranks) == 1 else "have"
