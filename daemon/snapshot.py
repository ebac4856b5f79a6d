"""Snapshots: a run as it is now, from what the daemon holds or, without one, from disk."""

from __future__ import annotations

import math
import time
from typing import Any

from distui.core.paths import RunFolder
from distui.daemon.diagnosis import HANG_S, diagnose
from distui.daemon.observe import DEAD, FINISHED, STOPPED, Observed, launcher_alive, observe
from distui.daemon.runs import FINAL_STATES, read_json
from distui.daemon.state import RankRecord, RunState
from distui.daemon.store import read_batches
from distui.proto import telemetry_pb2 as pb

STALLED = frozenset({"hang", "data_stall", "dead_rank", "out_of_memory"})
"""Verdicts after which a run does not go on by itself."""
WAITING_S = 1.0
"""A rank that is blocked in a collective for less is running: every step waits a little."""
UNHEARD_S = 600.0
"""A run of which nothing was ever heard has failed to start after so long."""


def load_state(run: RunFolder) -> RunState:
    """Read a run from disk."""
    state = RunState(run)
    for batch in read_batches(run):
        if state.only_new(batch):
            state.apply(batch)
    return state


def read_snapshot(run: RunFolder) -> pb.Snapshot:
    """Return the run's snapshot from disk, no daemon needed; what is alive on this node is looked at."""
    return take_snapshot(load_state(run), time.time())


def take_snapshot(state: RunState, now_s: float) -> pb.Snapshot:
    """Return what is known of the run at `now_s` (Unix seconds)."""
    state.check_outcome()
    ranks = observe(state, now_s)
    diagnosis = diagnose(state, ranks, now_s)
    snapshot = pb.Snapshot(
        run=state.info,
        diagnosis=diagnosis,
        dropped=state.dropped,
        collectives=state.collectives.summaries(),
        nodes=[state.nodes[node] for node in sorted(state.nodes)],
    )
    snapshot.run.state, message = _run_state(state, ranks, diagnosis, now_s)
    snapshot.run.message = snapshot.run.message or message
    outcome = read_json(state.run.outcome) if state.final else None
    ended = {found.get("rank"): found for found in (outcome or {}).get("ranks") or ()}
    for rank in ranks:
        snapshot.ranks.append(rank_state(state.ranks[rank.rank], rank, now_s))
        if state.final:
            _end_rank(snapshot.ranks[-1], rank, snapshot.run.state, ended.get(rank.rank))
    return snapshot


def _run_state(state: RunState, ranks: list[Observed], diagnosis: list[pb.Diagnosis], now_s: float) -> tuple[str, str]:
    if state.info.state in FINAL_STATES:
        return state.info.state, ""
    if not launcher_alive(state, now_s):
        if (
            ranks
            and all(rank.process == FINISHED and rank.told for rank in ranks)
            and len(ranks) >= state.info.world_size
        ):
            return "finished", ""
        if ranks and all(rank.process in (DEAD, FINISHED) for rank in ranks):
            return "failed", "all of its processes are gone, and none has said how it ended"
        if not ranks and (state.launcher is not None or now_s - state.info.started_s > UNHEARD_S):
            return "failed", "no rank was ever heard of, and its launcher is gone"
    # A mismatch that did not hold anybody up is told, and the run goes on.
    held = any(rank.wait is not None and now_s - rank.wait.since_s > HANG_S for rank in ranks)
    if any(one.kind in STALLED or (one.kind == "mismatch" and held) for one in diagnosis):
        return "stalled", ""
    started = any(record.started is not None for record in state.ranks.values())
    return ("running" if started or any(rank.step for rank in ranks) else "starting"), ""


def rank_state(record: RankRecord, rank: Observed, now_s: float) -> pb.RankState:
    """Return one rank as watchers see it. Units: `now_s` in Unix seconds."""
    found = pb.RankState(
        rank=rank.rank,
        node=rank.node,
        pid=rank.pid,
        state=rank.process,
        last_step=record.last_step,
        memory=record.memory,
        heartbeat=record.heartbeat,
        error=rank.error,
        step=rank.step or None,
        loss=record.loss,
        last_seen_s=rank.last_seen_s or None,
    )
    if rank.process not in (DEAD, FINISHED, STOPPED):
        waits = rank.wait is not None and now_s - rank.wait.since_s > WAITING_S
        found.state = "waiting" if waits else "running"
    if record.recent:
        time_s = sum(step_s for step_s, _ in record.recent)
        tokens = sum(num_tokens for _, num_tokens in record.recent)
        found.step_s = time_s / len(record.recent)
        if tokens and time_s > 0:
            found.tokens_per_s = tokens / time_s
    if record.memory is not None:
        memory = record.memory
        if memory.HasField("allocated_bytes"):
            found.memory_bytes = memory.allocated_bytes
        elif memory.HasField("rss_bytes"):
            found.memory_bytes = memory.rss_bytes
    if record.started is not None:
        found.device, found.device_name = record.started.device, record.started.device_name
        found.num_parameters = record.started.num_parameters
    return found


def _end_rank(found: pb.RankState, rank: Observed, run_state: str, ended: dict[str, Any] | None) -> None:
    """Say how a rank of a run that has ended did: by its own word, else by the launcher's."""
    if rank.process == FINISHED or run_state == "finished" or (ended is not None and ended.get("exit_status") == 0):
        found.state = "finished"
    else:
        found.state = "stopped" if run_state == "stopped" else "dead"
        found.error = found.error or str((ended or {}).get("error") or "")


def snapshot_json(snapshot: pb.Snapshot) -> dict[str, Any]:
    """Return what `distui status --json` prints; None stands for what is not available."""

    def known(rank: pb.RankState, name: str) -> Any:
        value = getattr(rank, name) if rank.HasField(name) else None
        return value if value is None or math.isfinite(value) else None  # JSON has no NaN

    return {
        "run": snapshot.run.run_id,
        "state": snapshot.run.state,
        "strategy": snapshot.run.strategy,
        "ranks": [
            {
                "rank": rank.rank,
                "node": rank.node,
                "pid": rank.pid,
                "state": rank.state,
                **{name: known(rank, name) for name in ("step", "loss", "step_s", "tokens_per_s", "memory_bytes")},
            }
            for rank in snapshot.ranks
        ],
        "diagnosis": [
            {
                "kind": found.kind,
                "ranks": list(found.ranks),
                "collective": found.collective or None,
                "group": found.group or None,
                "seq": found.seq or None,
                "since_s": found.since_s,
                "message": found.message,
            }
            for found in snapshot.diagnosis
        ],
        "dropped": snapshot.dropped,
    }
