"""What is wrong with a run, the cause first: deaths, hangs, mismatches, slowness, bad numbers, full disks.

A dead process outranks a stopped one, and that what the ranks say of each other. Slowness is not looked for while
something hangs: everybody is slow then.
"""

from __future__ import annotations

import os
import time

from distui.core.telemetry.ledger import CollectiveEntry, LedgerReader, LedgerUnreadable
from distui.daemon.diagnosis.busy import PATIENT_PHASES
from distui.daemon.diagnosis.collectives import Mismatch, compare
from distui.daemon.diagnosis.deaths import dead
from distui.daemon.diagnosis.drifts import (
    bad_loss,
    cpu_throttled,
    data_bound,
    launcher_stopped,
    loss_spike,
    memory_growth,
)
from distui.daemon.diagnosis.gpu_faults import device_note, gpu_errors
from distui.daemon.diagnosis.hangs import HANG_S, allowance_s, hang, names
from distui.daemon.diagnosis.observe import DEAD, FINISHED, Observed, group_members, this_node
from distui.daemon.diagnosis.pace import SlowLink, Straggler
from distui.daemon.runs.folders import read_ending
from distui.daemon.runs.state import Parts, RunState
from distui.proto import telemetry_pb2 as pb

LITTLE_BYTES = 32 << 20
"""A disk with less is full: a checkpoint does not fit, and telemetry soon neither."""
LITTLE_SHARE = 0.05
LAST_ENTRIES = 16
PHASES = ("data", "forward", "backward", "optimizer")
EXPLAINS_SHARE = 0.25
"""A phase that takes longer by less of what a rank is late is not why."""
CPU_FULL_S = 10.0
"""After its processors had nothing left, a node's slowness says nothing of its links for so long."""

__all__ = ["HANG_S", "allowance_s", "diagnose"]


def diagnose(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return what is wrong, the cause first; of a run that has failed, what it failed of."""
    if state.final and state.info.state != "failed":
        return []
    ending = {} if state.final else read_ending(state.run)
    if ending.get("stopped_by"):
        return gpu_errors(state, [], now_s) + bad_loss(state, now_s)  # what its ranks die of now is the launcher
    found = dead(state, ranks, now_s, ending)
    if found and (differs := _last_mismatch(state, ranks, now_s)) is not None:
        # Gloo ends the process that gets another size than it expected: the death is what the mismatch did.
        return [_mismatch(differs, now_s, found[0].message), *found]
    if state.final:
        return gpu_errors(state, found, now_s) + found
    for rank in ranks:
        if rank.phase in PATIENT_PHASES:  # what the others wait for then is no slowness
            state.collectives.pace.excuse(rank.rank, rank.phase_since_s, now_s)
    if not found and not ending:
        found = hang(state, ranks, now_s)
    if (mismatch := state.collectives.mismatch) is not None and not any(one.kind == "mismatch" for one in found):
        found.append(_mismatch(mismatch, now_s))
    if not any(one.kind in ("hang", "data_stall", "left_early", "dead_rank", "out_of_memory") for one in found):
        link = state.collectives.pace.slow_link(time.time())
        if link is not None and not _cpu_full(state, link.ranks, now_s):
            found.append(_slow_link(link, state))
        elif (straggler := state.collectives.pace.straggler(time.time())) is not None:
            found.extend(_straggler(state, ranks, straggler))
        else:
            found += data_bound(state, ranks, now_s)
        found += cpu_throttled(state, ranks)
    found = gpu_errors(state, found, now_s) + found
    found += bad_loss(state, now_s) or loss_spike(state, now_s)
    found += memory_growth(state, ranks)
    found += launcher_stopped(state, now_s)
    found += _disk_full(state)
    return found


def _mismatch(found: Mismatch, now_s: float, and_then: str = "") -> pb.Diagnosis:
    return pb.Diagnosis(
        kind="mismatch",
        ranks=found.ranks,
        collective=found.op,
        group=found.group,
        seq=found.seq,
        since_s=max(0.0, now_s - found.time_s),
        message=f"ranks disagree on #{found.seq} of {found.group}: {found.what}; look for a branch that not all ranks "
        f"take{f'; so {and_then}' if and_then else ''}",
    )


def _last_mismatch(state: RunState, ranks: list[Observed], now_s: float) -> Mismatch | None:
    """Compare the last collectives in the ledgers of a run in which somebody died."""
    places: dict[tuple[str, int], dict[int, CollectiveEntry]] = {}
    for rank in ranks:
        if rank.node != this_node():
            continue
        try:
            with LedgerReader.open(state.run.rank_ledger(rank.rank)) as reader:
                if reader.incarnation != state.ranks[rank.rank].incarnation:
                    continue
                for entry in reader.entries(reader.head() - LAST_ENTRIES):
                    places.setdefault((entry.group, entry.seq), {})[rank.rank] = entry
        except (OSError, LedgerUnreadable):
            continue  # it never came so far
    come = not state.final and any(rank.process not in (DEAD, FINISHED) for rank in ranks)
    for place, entries in sorted(places.items(), key=lambda one: min(e.enqueued_s for e in one[1].values())):
        newest = max(entries.values(), key=lambda entry: entry.enqueued_s)
        size = newest.group_size if come and now_s - newest.enqueued_s < HANG_S else 0
        found = compare(*place, {rank: (entry.op, entry.num_bytes) for rank, entry in entries.items()}, size)
        if found is not None:
            return Mismatch(*found[:4], newest.enqueued_s, found[4])
    return None


def _straggler(state: RunState, ranks: list[Observed], found: Straggler) -> list[pb.Diagnosis]:
    late = [rank for rank in ranks if rank.rank in found.ranks]
    if not late:
        return []
    if _steps_alone(state, ranks, found):
        return []  # it trains and the others make its data, or the other way round
    first, several = late[0], len(late) > 1
    phase, excess_s = _slow_phase(state, found.ranks)
    if excess_s < EXPLAINS_SHARE * found.mean_gap_s:
        phase = ""  # it is late of what it does outside its steps
    if len({rank.node for rank in ranks}) > 1 and not phase:
        return []  # clocks of several nodes differ: its own steps must say it too
    its, it_is, it_does = ("their", "they are", "they do") if several else ("its", "it is", "it does")
    where = (
        f"{its} {phase} takes {excess_s * 1e3:.0f} ms longer than the others' in the steps in which {it_is} late"
        if phase
        else f"distui control {state.run.run_id} stacks shows what {it_does}"
    )
    device = device_note(state, first.rank)
    where += f"; {device}" * bool(device)
    return [
        pb.Diagnosis(
            kind="straggler",
            ranks=found.ranks,
            collective=found.op,
            group=found.group,
            seq=found.seq,
            since_s=found.since_s,
            message=f"{names(late)} arrive{'s' * (not several)} last in {found.group}, {found.mean_gap_s * 1e3:.0f} ms "
            f"behind the next, which costs the others {found.lost_share:.0%} of their time; {where}; look for another "
            "load on the host, a slower or hotter device, or more data than the others get",
        )
    ]


def _steps_alone(state: RunState, ranks: list[Observed], found: Straggler) -> bool:
    """Tell whether of the late ones and the others in the group only the one side has made steps of late."""
    began_s = time.time() - found.since_s / 2
    members = group_members(found.group)
    steps = {
        rank.rank: state.ranks[rank.rank].last_step_s > began_s
        for rank in ranks
        if members is None or rank.rank in members
    }
    late = {stepped for rank, stepped in steps.items() if rank in found.ranks}
    others = {stepped for rank, stepped in steps.items() if rank not in found.ranks}
    return (late == {True} and others == {False}) or (late == {False} and others == {True})


def _slow_phase(state: RunState, late: tuple[int, ...]) -> tuple[str, float]:
    """Return the phase in which late ranks took longer than the others, and by how much; "" if none.

    Only their slow steps count: one of ten that reads a file would not show in a mean.
    """
    mine = [parts for rank in late if (record := state.ranks.get(rank)) for parts in record.last_parts]
    theirs: dict[int, list[Parts]] = {}
    for rank, record in state.ranks.items():
        for step, parts in record.last_parts if rank not in late else ():
            theirs.setdefault(step, []).append(parts)
    excess = [
        [own - sum(other[at] for other in theirs[step]) / len(theirs[step]) for at, own in enumerate(parts)]
        for step, parts in mine
        if step in theirs
    ]
    if not excess:
        return "", 0.0
    most_s = max(sum(one) for one in excess)
    slow = [one for one in excess if sum(one) > most_s / 2] if most_s > 0 else []
    sums = [sum(one[at] for one in slow) for at in range(len(PHASES))]
    whole_s = sum(sum(parts) for step, parts in mine if step in theirs)
    worst = max(range(len(PHASES)), key=lambda at: sums[at])
    counts = sum(one[worst] for one in excess) > 0.03 * whole_s
    return (PHASES[worst], sums[worst] / len(slow)) if slow and counts else ("", 0.0)


def _cpu_full(state: RunState, ranks: tuple[int, ...], now_s: float) -> bool:
    nodes = {state.ranks[rank].node for rank in ranks if rank in state.ranks}
    return any(now_s - state.cpu_full_s.get(node, 0.0) < CPU_FULL_S for node in nodes)


def _slow_link(found: SlowLink, state: RunState) -> pb.Diagnosis:
    notes = [f"; rank {rank}, {note}" for rank in found.ranks if (note := device_note(state, rank))][:4]
    rate = f"{found.num_bytes / found.took_s / 2**20:,.1f} MiB/s" if found.took_s else "n/a"
    return pb.Diagnosis(
        kind="slow_link",
        ranks=found.ranks,
        collective=found.op,
        group=found.group,
        seq=found.seq,
        since_s=found.since_s,
        message=f"{found.op} of {found.num_bytes:,} bytes in {found.group} takes {found.took_s * 1e3:.1f} ms after the "
        f"last rank has arrived, {found.usual_s * 1e3:.1f} ms before ({rate} now); look at the network between ranks "
        f"{', '.join(map(str, found.ranks[:8]))}: distui doctor --collectives measures it{''.join(notes)}",
    )


def _disk_full(state: RunState) -> list[pb.Diagnosis]:
    try:
        disk = os.statvfs(state.run.path)
    except OSError:
        return []  # of another node
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    full = free < min(LITTLE_BYTES, LITTLE_SHARE * size)
    said = [
        event.event.message
        for event in state.events.all()[-50:]
        if event.event.level == pb.Event.ERROR and "No space left" in event.event.message
    ]
    if not full and not said:
        return []
    message = f"the disk of {state.run.path} has {free / 2**20:,.0f} MiB left of {size / 2**20:,.0f} MiB"
    if said:
        message += f"; {said[-1]}"
    return [
        pb.Diagnosis(
            kind="disk_full", message=f"{message}; training goes on: free some space for its telemetry and checkpoints"
        )
    ]
