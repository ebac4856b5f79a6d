"""What is wrong with a run, the cause first: deaths, hangs, mismatches, slowness, bad numbers, full disks.

A dead process outranks a stopped one, and that what the ranks say of each other. Slowness is not looked for while
something hangs: everybody is slow then.
"""

from __future__ import annotations

import math
import os
import time

from distui.core.telemetry.ledger import LedgerReader, LedgerUnreadable
from distui.daemon.collectives import Mismatch, compare
from distui.daemon.deaths import dead
from distui.daemon.gpu_faults import device_note, gpu_errors
from distui.daemon.hangs import HANG_S, allowance_s, hang
from distui.daemon.observe import Observed, this_node
from distui.daemon.pace import SlowLink, Straggler
from distui.daemon.state import RunState
from distui.proto import telemetry_pb2 as pb

LITTLE_BYTES = 32 << 20
"""A disk with less is full: a checkpoint does not fit, and telemetry soon neither."""
LITTLE_SHARE = 0.05
LAST_ENTRIES = 16
_PHASES = {"data_wait_s": "data", "forward_s": "forward", "backward_s": "backward", "optimizer_s": "optimizer"}

__all__ = ["HANG_S", "allowance_s", "diagnose"]


def diagnose(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return what is wrong, the cause first; of a run that has failed, what it failed of."""
    if state.final and state.info.state != "failed":
        return []
    found = dead(state, ranks, now_s)
    if found and (differs := _last_mismatch(state, ranks)) is not None:
        # Gloo ends the process that gets another size than it expected: the death is what the mismatch did.
        return [_mismatch(differs, now_s, found[0].message), *found]
    if state.final:
        return gpu_errors(state, found, now_s) + found
    if not found:
        found = hang(state, ranks, now_s)
    if (mismatch := state.collectives.mismatch) is not None and not any(one.kind == "mismatch" for one in found):
        found.append(_mismatch(mismatch, now_s))
    if not any(one.kind in ("hang", "data_stall", "dead_rank", "out_of_memory") for one in found):
        if (link := state.collectives.pace.slow_link(time.time())) is not None:
            found.append(_slow_link(link, state))
        elif (straggler := state.collectives.pace.straggler(time.time())) is not None:
            found.extend(_straggler(state, ranks, straggler))
    found = gpu_errors(state, found, now_s) + found
    found += _bad_loss(state, now_s)
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


def _last_mismatch(state: RunState, ranks: list[Observed]) -> Mismatch | None:
    """Compare the last collectives in the ledgers of a run in which somebody died."""
    places: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    times: dict[tuple[str, int], float] = {}
    for rank in ranks:
        if rank.node != this_node():
            continue
        try:
            with LedgerReader.open(state.run.rank_ledger(rank.rank)) as reader:
                if reader.incarnation != state.ranks[rank.rank].incarnation:
                    continue
                for entry in reader.entries(reader.head() - LAST_ENTRIES):
                    place = entry.group, entry.seq
                    places.setdefault(place, {})[rank.rank] = entry.op, entry.num_bytes
                    times[place] = entry.enqueued_s
        except (OSError, LedgerUnreadable):
            continue  # it never came so far
    for place in sorted(places, key=lambda one: times[one]):
        if len(places[place]) > 1 and (found := compare(*place, places[place])) is not None:
            return Mismatch(*found[:4], times[place], found[4])
    return None


def _straggler(state: RunState, ranks: list[Observed], found: Straggler) -> list[pb.Diagnosis]:
    phase, excess_s = _slow_phase(state, found.rank)
    if len({rank.node for rank in ranks}) > 1 and not phase:
        return []  # clocks of several nodes differ: its own steps must say it too
    where = (
        f"its {phase} takes {excess_s * 1e3:.0f} ms a step longer than the others'"
        if phase
        else "it tells of no phases: distui control RUN stacks shows what it does"
    )
    node = state.ranks[found.rank].node
    device = device_note(state, found.rank)
    where += f"; {device}" * bool(device)
    return [
        pb.Diagnosis(
            kind="straggler",
            ranks=[found.rank],
            collective=found.op,
            group=found.group,
            seq=found.seq,
            since_s=found.since_s,
            message=f"rank {found.rank} on {node} arrives last in {found.group}, {found.mean_gap_s * 1e3:.0f} ms "
            f"behind the next, which costs the others {found.lost_share:.0%} of their time; {where}; look for another "
            "load on its host, a slower or hotter device, or more data than the others get",
        )
    ]


def _slow_phase(state: RunState, rank: int) -> tuple[str, float]:
    """Return the phase in which a rank's last steps took longer than the others', and by how much; "" if none."""
    parts = {number: record.parts() for number, record in state.ranks.items()}
    mine = parts.pop(rank, None)
    others = [one for one in parts.values() if one]
    if not mine or not others:
        return "", 0.0
    excess = {name: mine[name] - sum(one[name] for one in others) / len(others) for name in _PHASES}
    worst = max(excess, key=lambda name: excess[name])
    whole_s = sum(mine[name] for name in _PHASES)
    return (_PHASES[worst], excess[worst]) if excess[worst] > 0.03 * whole_s else ("", 0.0)


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


def _bad_loss(state: RunState, now_s: float) -> list[pb.Diagnosis]:
    bad = sorted(
        rank for rank, record in state.ranks.items() if record.loss is not None and not math.isfinite(record.loss)
    )
    steps = [step for rank in bad if (step := state.ranks[rank].bad_since_step)]
    if not bad or all(record.last_step is not None and record.last_step.skipped for record in state.ranks.values()):
        return []
    since_s = min((state.ranks[rank].bad_since_s for rank in bad), default=now_s)
    shown = ", ".join(map(str, bad[:8]))
    return [
        pb.Diagnosis(
            kind="nan_loss",
            ranks=bad,
            since_s=max(0.0, now_s - since_s),
            message=f"the loss of rank{'s' * (len(bad) > 1)} {shown} is {state.ranks[bad[0]].loss} since step "
            f"{min(steps) if steps else 'n/a'}; stop, go back to a checkpoint, and look at the learning rate, the "
            "batch of that step, or fp16 without loss scaling",
        )
    ]


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
