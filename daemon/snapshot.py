"""A run's snapshot from its folder, without a daemon, and as the JSON of `distui status --json`."""

from __future__ import annotations

import time
from typing import Any

from distui.core.paths import RunFolder
from distui.daemon.state import replay
from distui.daemon.store import read_batches
from distui.proto import telemetry_pb2 as pb


def read_snapshot(run: RunFolder) -> pb.Snapshot:
    """Return the snapshot of a run from what is on disk."""
    state = replay(run, read_batches(run))
    now_s = time.time()
    state.refresh(now_s)
    return state.snapshot(now_s)


def snapshot_json(snapshot: pb.Snapshot) -> dict[str, Any]:
    """Return what `distui status --json` prints; a value that is not available is None."""

    def known(message: pb.RankState, name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

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
                "step": known(rank, "step"),
                "loss": known(rank, "loss"),
                "step_s": known(rank, "step_s"),
                "tokens_per_s": known(rank, "tokens_per_s"),
                "memory_bytes": known(rank, "memory_bytes"),
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
