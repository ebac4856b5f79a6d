"""Ranks that died, and of what: an exception, a signal, too little memory."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from distui.core.paths import list_own
from distui.core.telemetry.ledger import RECENT, CollectiveEntry, LedgerReader, LedgerUnreadable
from distui.core.telemetry.stacks import KnownStack, known_stack
from distui.daemon.diagnosis.hangs import left_early, names, waits
from distui.daemon.diagnosis.observe import DEAD, FINISHED, Observed, Wait, entries_at, this_node
from distui.daemon.diagnosis.where import own_place, text_of
from distui.daemon.node.processes import heirs
from distui.daemon.runs.folders import read_outcome
from distui.daemon.runs.state import RunState
from distui.proto import telemetry_pb2 as pb

_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory|bad_alloc|Cannot allocate memory", re.IGNORECASE
)
_DISK = re.compile(r"No space left on device|ENOSPC|Disk quota exceeded", re.IGNORECASE)
_PEER = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|peer|remote|[Tt]imed out|DistNetworkError"
)
_TIMEOUT = re.compile(r"[Tt]imed out|[Tt]imeout|monitoredBarrier")
_SIZE = re.compile(r"opts?\.preamble\.length|op\.preamble|size mismatch|not match.*size", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([0-9, ]+)\)")
HEIRS_S = 6.0
"""A loader's workers see within five seconds that their rank is gone; who lives on after that was to live on."""
SETTLE_S = 0.4
"""A rank that fails may be seen before the one whose death it failed of."""


def dead(state: RunState, ranks: list[Observed], now_s: float, ending: dict[str, Any]) -> list[pb.Diagnosis]:
    """Return the rank that died first, and of what: the others lost their peer, or were ended for it (`ending`)."""
    outcome = read_outcome(state.run) if state.final else ending
    well = {one["rank"] for one in outcome.get("ranks") or () if one.get("exit_status") == 0}
    for rank in ranks:
        if rank.process == DEAD and not rank.told and rank.rank in well:  # os._exit(0): it could not say so
            rank.process, rank.told = FINISHED, True
    gone = [rank for rank in ranks if rank.process == DEAD]
    if state.final and state.info.state != "failed":
        return []
    if ending.get("ranks"):
        first_bad = {one["rank"] for one in ending["ranks"]}
        gone = [rank for rank in gone if rank.rank in first_bad] or gone
    if not gone:
        return []
    first = min(gone, key=lambda rank: (_order(rank, outcome), rank.last_seen_s, rank.rank))
    ended_s = first.ledger.ended_s if first.ledger is not None else None
    if _order(first, outcome) > 1 and ended_s is not None and now_s - ended_s < SETTLE_S:
        return []  # the peer that it may have lost is still on its way out
    ended: dict[str, Any] = next((one for one in outcome.get("ranks") or () if one.get("rank") == first.rank), {})
    if _PEER.search(first.error or str(ended.get("error") or "")) and (told := _left(state, first, ranks, now_s)):
        return [told]
    if _TIMEOUT.search(first.error) and (told := _never_came(state, first, ranks, now_s)) is not None:
        return [told]
    return [_dead(state, first, ranks, outcome, now_s)]


def _left(state: RunState, failed: Observed, ranks: list[Observed], now_s: float) -> pb.Diagnosis | None:
    """Return that ranks have ended in good order before a collective that the one that failed was in."""
    if failed.ledger is None:
        return None
    for group, seq in failed.ledger.last_seq.items():
        wait = Wait(group, seq, "collective", failed.last_seen_s)
        known = {rank.rank: rank.ledger.last_seq.get(group, 0) for rank in ranks if rank.ledger is not None}
        left = [
            rank
            for rank in ranks
            if rank.process == FINISHED and rank.told and wait.has(rank.rank) and 0 < known.get(rank.rank, 0) < seq
        ]
        if left:
            entry = entries_at(state.run, group, seq, [failed]).get(failed.rank)
            wait = Wait(group, seq, entry.op if entry is not None else wait.op, wait.since_s)
            return left_early(left, [failed], wait, max(0.0, now_s - failed.last_seen_s))
    return None


def _never_came(state: RunState, failed: Observed, ranks: list[Observed], now_s: float) -> pb.Diagnosis | None:
    """Return whom the one that failed had waited for until its time was over."""
    if failed.ledger is None:
        return None
    seen = [rank for rank in ranks if rank is not failed and rank.ledger is not None and rank.node == this_node()]
    since_s = max(0.0, now_s - failed.last_seen_s)
    if not failed.ledger.last_seq:  # it never got past init_process_group
        stacks = {rank.rank: known_stack(state.run, rank.rank) for rank in seen}
        late = [rank for rank in seen if _entered_none(rank) and _elsewhere(stacks[rank.rank])]
        wait, where = Wait("world", 0, "init_process_group", failed.last_seen_s), "init_process_group"
    else:
        last = _last_entry(state, failed)
        if last is None:
            return None
        wait, where = Wait(last.group, last.seq, last.op, last.enqueued_s), ""
        known = {rank.rank: rank.ledger.last_seq.get(wait.group, 0) for rank in seen if rank.ledger is not None}
        late = [rank for rank in seen if wait.has(rank.rank) and 0 < known[rank.rank] < wait.seq]
    if not late:
        return None
    stack = known_stack(state.run, late[0].rank)
    place = f", last seen at {text_of(stack.frames)}; look at {own_place(stack.frames)}" if stack is not None else ""
    told = pb.Diagnosis(
        kind="hang",
        ranks=[rank.rank for rank in late],
        since_s=since_s,
        message=f"{names(late)} never came to {where or wait.text()}, where {names([failed])} waited until its "
        f"time was over ({failed.error.partition(chr(10))[0]}){place}",
    )
    if not where:
        told.collective, told.group, told.seq = wait.op, wait.group, wait.seq
    return told


def _entered_none(rank: Observed) -> bool:
    return rank.ledger is not None and not rank.ledger.last_seq


def _elsewhere(stack: KnownStack | None) -> bool:
    return stack is not None and not any("/distributed_c10d.py:" in frame for frame in stack.frames)


def _last_entry(state: RunState, rank: Observed) -> CollectiveEntry | None:
    try:
        with LedgerReader.open(state.run.rank_ledger(rank.rank)) as reader:
            return max(reader.entries(reader.head() - RECENT), key=lambda entry: entry.enqueued_s, default=None)
    except (OSError, LedgerUnreadable):
        return None  # it is gone with the run's folder


def _order(rank: Observed, outcome: dict[str, Any]) -> int:
    if outcome.get("failed_rank") == rank.rank:
        return 0
    if not rank.told:
        return 1
    return 3 if _PEER.search(rank.error) else 2


def _dead(
    state: RunState, rank: Observed, ranks: list[Observed], outcome: dict[str, Any], now_s: float
) -> pb.Diagnosis:
    ended: dict[str, Any] = next((one for one in outcome.get("ranks") or () if one.get("rank") == rank.rank), {})
    error = rank.error or str(ended.get("error") or "")
    record = state.ranks[rank.rank]
    waiting = [one for one in ranks if one.wait is not None and one.process not in (DEAD, FINISHED)]
    wait = waiting[0].wait if waiting else None
    known = known_stack(state.run, rank.rank) if rank.node == this_node() else None
    place = f", last seen at {text_of(known.frames)}" if known is not None and known.frames[0] else ""
    kind, how, advice = "dead_rank", "", f"see rank{rank.rank}.log and the kernel's log"
    used = _memory(record.memory)
    if rank.told or (error and not ended.get("signal")):
        how = f"failed: {error}"
        advice = f"see rank{rank.rank}.log"
        if worker := _WORKER.search(error):
            kind, advice = _worker(worker[1], error, rank.node, advice)
        elif _MEMORY.search(error):
            kind, advice = (
                "out_of_memory",
                f"{used}; a smaller micro batch, a higher ZeRO stage, offload or activation ",
            )
            advice += "checkpointing take less: distui plan says how much"
        elif _DISK.search(error):
            kind, advice = "disk_full", f"free some space or write elsewhere; the run is in {state.run.path}"
        elif _SIZE.search(error):
            kind, advice = "mismatch", "ranks brought different sizes to one collective"
    elif oom_killed(rank.pid, rank.node):
        kind, how = "out_of_memory", "was killed by the kernel: the memory of its host or control group was used up"
        advice = f"{used}; fewer ranks or loader workers on the host, or offload less"
    else:
        how = "is gone without a word (killed, or out of memory)"
        if ended.get("signal"):
            how = f"was ended by {_signal_name(ended['signal'])}"
        elif ended.get("exit_status"):
            how = f"ended with exit status {ended['exit_status']}, without a word"
        gone_s = now_s - rank.last_seen_s if not state.final and rank.node == this_node() else 0.0
        if gone_s > HEIRS_S and (left := heirs(state.run, rank.rank, rank.pid)):
            which = f"process {left[0]} goes" if len(left) == 1 else f"processes {', '.join(map(str, left[:8]))} go"
            how += f"; its child {which} on without it"
            advice += (
                ". A child that takes over is not the rank: launcher, telemetry and the group's threads stay with "
                "the process that was started; train in that, and fork before init_process_group at most"
            )
    if list_own(flight := state.run.nccl):
        advice += f"; torchfrtrace --prefix rank {flight} reads what NCCL's flight recorder kept"
    others = waits(waiting, wait) if wait else ""
    told = pb.Diagnosis(
        kind=kind,
        ranks=[rank.rank],
        since_s=max(0.0, now_s - (state.info.finished_s if state.final else rank.last_seen_s)),
        message=f"{names([rank])} (pid {rank.pid}) {how} after step {rank.step}{place}{others}; {advice}",
    )
    if wait is not None:
        told.collective, told.group, told.seq = wait.op, wait.group, wait.seq
    return told


def _worker(pids: str, error: str, node: str, advice: str) -> tuple[str, str]:
    """Return the kind and what to do where a loader's worker ended, which torch tells of its signal at most."""
    if any(oom_killed(int(pid), node) for pid in re.findall("[0-9]+", pids)):
        return (
            "out_of_memory",
            "the kernel killed the loader's worker for memory: fewer workers, or less kept in the dataset",
        )
    if "Bus error" in error:
        return (
            "dead_rank",
            "workers hand batches over in /dev/shm, which is full: make it larger (--shm-size), or fewer workers",
        )
    return "dead_rank", f"its loader's worker ended: look at the dataset's __getitem__; {advice}"


def _signal_name(number: object) -> str:
    try:
        return signal.Signals(int(str(number))).name
    except ValueError:
        return f"signal {number}"


def _memory(memory: pb.Memory | None) -> str:
    if memory is None:
        return "its memory was never told"
    if memory.HasField("allocated_bytes"):
        return f"it last held {memory.allocated_bytes / 2**30:.2f} GiB on the device"
    return f"it last held {memory.rss_bytes / 2**30:.2f} GiB (peak {memory.peak_rss_bytes / 2**30:.2f} GiB)"


def oom_killed(pid: int, node: str, log: Path = Path("/dev/kmsg")) -> bool:
    """Tell whether the kernel says that it killed a process of this node for memory; False where it may not be read."""
    if node != this_node():
        return False
    import os

    words = re.compile(rf"Killed process {pid} \(|oom-kill:.*pid={pid},")
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:
            line = os.read(descriptor, 8192)
            if not line:
                return False
            if words.search(line.decode(errors="replace")):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return False  # the ring was overrun while it was read
    finally:
        os.close(descriptor)
