"""Snapshots: a run as it is now, from what the daemon holds or, without one, from disk."""

from __future__ import annotations

import math
import time
from typing import Any

from distui.core.paths import RunFolder
from distui.core.telemetry.harmless import make_harmless
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, Observed, launcher_alive, observe
from distui.daemon.diagnosis.verdicts import HANG_S, diagnose
from distui.daemon.runs.folders import FINAL_STATES, read_outcome
from distui.daemon.runs.state import RankRecord, RunState
from distui.daemon.runs.store import read_batches
from distui.daemon.runs.unsent import Unsent
from distui.proto import telemetry_pb2 as pb

RATES = ("step", "loss", "step_s", "tokens_per_s", "samples_per_s", "memory_bytes")
"""What status prints of a rank where it is known."""
STALLED = frozenset({"hang", "data_stall", "left_early", "dead_rank", "out_of_memory"})
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
    state = load_state(run)
    Unsent(run).take_into(state, of_the_living=True)
    return take_snapshot(state, time.time())


def take_snapshot(state: RunState, now_s: float) -> pb.Snapshot:
    """Return what is known of the run at `now_s` (Unix seconds)."""
    state.check_outcome()
    if state.many is not None:
        of_many: pb.Snapshot = state.many.snapshot(state, now_s)
        return of_many
    ranks = observe(state, now_s)
    diagnosis = diagnose(state, ranks, now_s)
    snapshot = pb.Snapshot(
        run=state.info,
        diagnosis=diagnosis,
        dropped=state.dropped + sum(rank.ledger.lost for rank in ranks if rank.ledger is not None),
        collectives=state.collectives.summaries(),
        nodes=[state.nodes[node] for node in sorted(state.nodes)],
    )
    snapshot.run.state, message = _run_state(state, ranks, diagnosis, now_s)
    snapshot.run.message = snapshot.run.message or message
    outcome = read_outcome(state.run) if state.final else {}
    ended = {found["rank"]: found for found in outcome.get("ranks", ())}
    for rank in ranks:
        snapshot.ranks.append(rank_state(state.ranks[rank.rank], rank, now_s))
        if state.final:
            _end_rank(snapshot.ranks[-1], rank, snapshot.run.state, ended.get(rank.rank))
    _progress(snapshot)
    ended_s = snapshot.run.finished_s if snapshot.run.HasField("finished_s") else now_s
    if (effort := state.effort.told(snapshot.run.started_s, ended_s, was_cut=was_cut(snapshot.run))) is not None:
        snapshot.effort.CopyFrom(effort)
    make_harmless(snapshot)  # verdicts have words of ledgers and stacks in them
    return snapshot


def was_cut(run: pb.RunInfo) -> bool:
    """Tell whether a run has ended before it was done."""
    return run.state in FINAL_STATES and run.state != "finished"


def _progress(snapshot: pb.Snapshot) -> None:
    """Say how far the run is: the step that all ranks have done, of how many, and how long the rest will take."""
    steps = [rank.step for rank in snapshot.ranks if rank.HasField("step")]
    if not steps or len(steps) < len(snapshot.ranks):
        return
    snapshot.step = min(steps)
    total = max(rank.last_step.total_steps for rank in snapshot.ranks)
    if not total:
        return
    snapshot.total_steps = total
    if snapshot.run.state in ("running", "starting"):
        pace_s = max(rank.step_s for rank in snapshot.ranks)
        snapshot.left_s = max(0, total - snapshot.step) * pace_s


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
    found.busy = rank.busy
    if record.recent:
        time_s, tokens, samples = (sum(part) for part in zip(*record.recent, strict=True))
        found.step_s = time_s / len(record.recent)
        if tokens and time_s > 0:
            found.tokens_per_s = tokens / time_s
        if samples and time_s > 0:
            found.samples_per_s = samples / time_s
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
        "restarts": snapshot.run.restarts,
        "effort": {field.name: getattr(snapshot.effort, field.name) for field in pb.Effort.DESCRIPTOR.fields}
        if snapshot.HasField("effort")
        else None,
        "progress": {
            name: getattr(snapshot, name) if snapshot.HasField(name) else None
            for name in ("step", "total_steps", "left_s")
        },
        "ranks": [
            {
                "rank": rank.rank,
                "node": rank.node,
                "pid": rank.pid,
                "state": rank.state,
                "busy": rank.busy or None,
                **{name: known(rank, name) for name in RATES},
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
