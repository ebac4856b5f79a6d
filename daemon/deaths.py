"""Ranks that died, and of what: an exception, a signal, too little memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distui.core.telemetry.stacks import known_stack
from distui.daemon.hangs import names, waits
from distui.daemon.observe import DEAD, FINISHED, Observed, this_node
from distui.daemon.runs import read_json
from distui.daemon.state import RunState
from distui.daemon.where import text_of
from distui.proto import telemetry_pb2 as pb

_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory|bad_alloc|Cannot allocate memory", re.IGNORECASE
)
_DISK = re.compile(r"No space left on device|ENOSPC|Disk quota exceeded", re.IGNORECASE)
_PEER = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|peer|remote|[Tt]imed out|DistNetworkError"
)
_SIZE = re.compile(r"opts?\.preamble\.length|op\.preamble|size mismatch|not match.*size", re.IGNORECASE)
SETTLE_S = 0.4
"""A rank that fails may be seen before the one whose death it failed of."""


def dead(state: RunState, ranks: list[Observed], now_s: float) -> list[pb.Diagnosis]:
    """Return the rank that died first, and of what: the others lost their peer."""
    outcome = (read_json(state.run.outcome) or {}) if state.final else {}
    gone = [rank for rank in ranks if rank.process == DEAD]
    if state.final and state.info.state != "failed":
        return []
    if not gone:
        return []
    first = min(gone, key=lambda rank: (_order(rank, outcome), rank.last_seen_s, rank.rank))
    ended_s = first.ledger.ended_s if first.ledger is not None else None
    if _order(first, outcome) > 1 and ended_s is not None and now_s - ended_s < SETTLE_S:
        return []  # the peer that it may have lost is still on its way out
    return [_dead(state, first, ranks, outcome, now_s)]


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
        if _MEMORY.search(error):
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
            how = f"was killed by signal {ended['signal']}"
    if (flight := state.run.nccl).is_dir() and any(flight.iterdir()):
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
