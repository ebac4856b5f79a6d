"""What a report says of a run: read from its folder, the daemon is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distui.core.errors import NotOwn
from distui.core.paths import RunFolder, open_own, read_json
from distui.core.telemetry.harmless import harmless
from distui.daemon.runs.folders import read_outcome
from distui.daemon.runs.snapshot import load_state, take_snapshot
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
    provenance: dict[str, Any]
    """Host, versions, folder, commit and origins of settings, as launch wrote them; empty where it did not."""


def read_report(run: RunFolder, now_s: float, max_steps: int = 2000) -> RunReport:
    """Read the run. Units: `now_s` in Unix seconds; it says how old what still runs is."""
    state = load_state(run)
    snapshot = take_snapshot(state, now_s)
    failed = read_outcome(run).get("failed_rank")
    rank = failed or 0
    report = read_json(run.rank_error(rank)) if failed is not None else None
    return RunReport(
        snapshot,
        state.steps.history.all(max_steps),
        [event for event in state.events.all() if not event.event.kind.startswith("source_")][-MAX_EVENTS:],
        harmless(str((report or {}).get("traceback") or ""), lines=True),
        _tail(run, rank),
        snapshot.run.config_toml,
        provenance_of(run),
    )


def provenance_of(run: RunFolder) -> dict[str, Any]:
    """Return what run.json says of where the run comes from, its words made harmless."""
    found = (read_json(run.spec) or {}).get("provenance")
    made = _harmless(found if isinstance(found, dict) else {})
    for name in ("versions", "git", "origins"):
        made[name] = made[name] if isinstance(made.get(name), dict) else {}
    return made


def _harmless(found: dict[str, Any]) -> dict[str, Any]:
    return {
        harmless(str(key)): _harmless(value) if isinstance(value, dict) else harmless(str(value))
        for key, value in found.items()
    }


def _tail(run: RunFolder, rank: int) -> str:
    try:
        with open(open_own(run.rank_log(rank)), "rb") as log:
            log.seek(max(0, log.seek(0, 2) - 16384))
            text = log.read(16384).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except NotOwn as error:
        return f"n/a: {error.filename}: {error.strerror}"
    return "\n".join(harmless(text, lines=True).splitlines()[-LOG_LINES:])
