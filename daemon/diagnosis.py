"""Why a run does not go on, and who is to blame: dead ranks, hangs, mismatches.

A rank waits in a collective (group, sequence number) for those that have not entered it. The culprit is who is waited
for and waits for none. A dead process outranks a stopped one, and that what the ranks say of each other.
"""

from __future__ import annotations

from distui.core.paths import RunFolder
from distui.daemon.collectives import compare
from distui.daemon.observe import DEAD, FINISHED, STOPPED, Observed, Wait, entries_at
from distui.daemon.state import RunState
from distui.proto import telemetry_pb2 as pb

HANG_S = 5.0
HANG_STEPS = 5.0
PATIENT_S = 300.0
PATIENT_PHASES = frozenset({"evaluation", "checkpoint"})
_NAMED = 8


def allowance_s(state: RunState, ranks: list[Observed]) -> float:
    """Return for how long ranks may wait before it is called a hang.

    Longer before the first step (compilation, data) and while any rank evaluates or saves.
    """
    usual_s = max(HANG_S, HANG_STEPS * state.steps.p99_s())
    patient = any(rank.step == 0 or rank.phase in PATIENT_PHASES for rank in ranks if rank.process != FINISHED)
    return max(usual_s, PATIENT_S) if patient else usual_s


def diagnose(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return what is wrong, the cause first. Nothing for a run that has ended."""
    if state.final:
        return []
    found = _dead(ranks, now_s)
    if not found:
        found = _hang(state, ranks, now_s)
    if (mismatch := state.collectives.mismatch) is not None and not any(one.kind == "mismatch" for one in found):
        found.append(
            pb.Diagnosis(
                kind="mismatch",
                ranks=mismatch.ranks,
                collective=mismatch.op,
                group=mismatch.group,
                seq=mismatch.seq,
                since_s=max(0.0, now_s - mismatch.time_s),
                message=f"ranks disagree on #{mismatch.seq} of {mismatch.group}: {mismatch.what}; look for a branch "
                "that not all ranks take",
            )
        )
    return found


def _dead(ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    found = []
    waiting = [rank for rank in ranks if rank.wait is not None and rank.process not in (DEAD, FINISHED)]
    for rank in ranks:
        if rank.process != DEAD:
            continue
        how = f"failed: {rank.error}" if rank.error else "is gone without a word (killed, or out of memory)"
        wait = waiting[0].wait if waiting else None
        waits = _waits(waiting, wait) if wait else ""
        found.append(
            pb.Diagnosis(
                kind="dead_rank",
                ranks=[rank.rank],
                since_s=max(0.0, now_s - rank.last_seen_s),
                message=f"rank {rank.rank} on {rank.node} (pid {rank.pid}) {how} after step {rank.step}{waits}; "
                f"see rank{rank.rank}.log and the kernel's log",
            )
        )
    return found


def _hang(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    limit_s = allowance_s(state, ranks)
    stopped = [rank for rank in ranks if rank.process == STOPPED and now_s - rank.last_seen_s > min(limit_s, HANG_S)]
    waiting = [
        rank
        for rank in ranks
        if rank.process not in (DEAD, FINISHED) and rank.wait is not None and now_s - rank.wait.since_s > limit_s
    ]
    if not waiting and not stopped:
        return []
    if stopped:
        others = [rank for rank in waiting if rank.process != STOPPED]
        return [_stopped(stopped, others, now_s)]
    return [_blame(state, ranks, waiting, now_s)]


def _stopped(stopped: list[Observed], waiting: list[Observed], now_s: float) -> pb.Diagnosis:
    pids = " ".join(str(rank.pid) for rank in stopped[:_NAMED])
    wait = waiting[0].wait if waiting else None
    waits = _waits(waiting, wait) if wait else ""
    since_s = max(now_s - min(rank.last_seen_s for rank in stopped), 0.0)
    return _told(
        stopped,
        wait,
        since_s,
        f"{_names(stopped)} {_are(stopped)} stopped by a signal{waits}; to let go on: kill -CONT {pids}",
    )


def _blame(state: RunState, ranks: list[Observed], waiting: list[Observed], now_s: float) -> pb.Diagnosis:
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
        held = [rank for rank in blocked if missing[rank.rank] & set(sinks)]
        # The collective that the culprit is missing in: the one that someone has waited for it in the longest.
        wait = min((rank.wait for rank in held if rank.wait), key=lambda one: one.since_s)
        culprits = [by_number[number] for number in sinks]
        doing = culprits[0].phase or "an unknown phase"
        return _told(
            culprits,
            wait,
            now_s - wait.since_s,
            f"{_names(culprits)} {_have(culprits)} not entered {wait.text()} (last known in {doing}, after step "
            f"{culprits[0].step}); {_names(held)} wait{'s' * (len(held) == 1)} there; distui control "
            f"{state.run.run_id} stacks shows where",
        )
    if waited_for:
        cycle = [by_number[number] for number in sorted(waited_for)]
        places = "; ".join(f"rank {rank.rank} in {rank.wait.text()}" for rank in cycle[:_NAMED] if rank.wait)
        return _told(
            cycle,
            first.wait,
            since_s,
            f"ranks wait for each other in a circle: {places}; they call collectives in another order",
        )
    return _all_joined(state.run, ranks, waiting, first.wait, since_s)


def _all_joined(
    run: RunFolder, ranks: list[Observed], waiting: list[Observed], wait: Wait, since_s: float
) -> pb.Diagnosis:
    brought = {
        rank: (entry.op, entry.num_bytes) for rank, entry in entries_at(run, wait.group, wait.seq, ranks).items()
    }
    differs = compare(wait.group, wait.seq, brought)
    if differs is not None:
        blamed = [rank for rank in ranks if rank.rank in differs[3]]
        told = _told(
            blamed,
            wait,
            since_s,
            f"ranks disagree on #{wait.seq} of {wait.group}: {differs[4]}; look for a branch that not all ranks take",
        )
        told.kind = "mismatch"
        return told
    return _told(
        waiting,
        wait,
        since_s,
        f"all ranks have entered {wait.text()} and it does not end: the network or the backend is stuck; "
        f"distui control {run.run_id} stacks shows where",
    )


def _lacks(rank: Observed, wait: Wait) -> bool:
    """Tell whether a rank has not entered the collective; one that never used the group is of another one or late."""
    if not wait.group:
        return rank.wait is None
    return rank.last_seq.get(wait.group, 0) < wait.seq


def _told(blamed: list[Observed], wait: Wait | None, since_s: float, message: str) -> pb.Diagnosis:
    told = pb.Diagnosis(kind="hang", ranks=[rank.rank for rank in blamed], since_s=max(0.0, since_s), message=message)
    if wait is not None:
        told.collective, told.group, told.seq = wait.op, wait.group, wait.seq
    return told


def _names(ranks: list[Observed]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0].rank} on {ranks[0].node}"
    shown = ", ".join(str(rank.rank) for rank in ranks[:_NAMED])
    return f"ranks {shown}" + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def _waits(ranks: list[Observed], wait: Wait) -> str:
    return f"; {_names(ranks)} wait{'s' * (len(ranks) == 1)} in {wait.text()}"


def _are(ranks: list[Observed]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _have(ranks: list[Observed]) -> str:
    return "has" if len(ranks) == 1 else "have"
