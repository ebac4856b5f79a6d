"""What a report says of a run: read from its folder, the daemon is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distui.core.paths import RunFolder
from distui.daemon.runs import read_json
from distui.daemon.snapshot import load_state, take_snapshot
from distui.proto import telemetry_pb2 as pb

LOG_LINES = 30
MAX_EVENTS = 200


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run as it is kept on disk."""

    snapshot: pb.Snapshot
    steps: Sequence[pb.StepSummary]
    events: Sequence[pb.TimedEvent]
    error: str
    """Traceback of the first rank that failed; "" where none did."""
    log_tail: str
    """The last lines of that rank's log, else of rank 0's."""
    config_toml: str


def read_report(run: RunFolder, now_s: float, max_steps: int = 2000) -> RunReport:
    """Read the run. Units: `now_s` in Unix seconds; it says how old what still runs is."""
    state = load_state(run)
    snapshot = take_snapshot(state, now_s)
    failed = (read_json(run.outcome) or {}).get("failed_rank")
    rank = failed if isinstance(failed, int) else 0
    report = read_json(run.rank_error(rank)) if isinstance(failed, int) else None
    return RunReport(
        snapshot,
        state.steps.history.all(max_steps),
        [event for event in state.events.all() if not event.event.kind.startswith("source_")][-MAX_EVENTS:],
        str((report or {}).get("traceback") or ""),
        _tail(run, rank),
        snapshot.run.config_toml,
    )


def _tail(run: RunFolder, rank: int) -> str:
    try:
        with open(run.rank_log(rank), "rb") as log:
            log.seek(max(0, log.seek(0, 2) - 16384))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-LOG_LINES:])
