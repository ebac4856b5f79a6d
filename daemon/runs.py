"""Finding runs on disk, and what run.json and outcome.json say of them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.paths import RunFolder, write_atomic
from distui.proto import telemetry_pb2 as pb

FINAL_STATES = frozenset({"finished", "failed", "stopped"})
_LISTED = 5


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object that a file holds; None where there is no such file or it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_info(run: RunFolder) -> pb.RunInfo:
    """Return what run.json and outcome.json say; `state` is "" where there is no outcome."""
    info = pb.RunInfo(run_id=run.run_id, run_dir=str(run.path))
    if (spec := read_json(run.spec)) is not None:
        for key in ("name", "strategy", "config_toml", "started_s", "world_size", "num_nodes"):
            _take(info, key, spec.get(key))
        info.command.extend(str(word) for word in spec.get("command") or ())
        planned = spec.get("planned_memory_bytes")
        for category, num_bytes in planned.items() if isinstance(planned, dict) else ():
            info.planned_memory_bytes[str(category)] = int(num_bytes)
    if not info.started_s:
        info.started_s = _folder_time_s(run.path)
    apply_outcome(info, read_json(run.outcome))
    return info


def write_outcome(run: RunFolder, info: pb.RunInfo) -> None:
    """Write how a run ended that another node's daemon has forwarded; on its own node the launcher does."""
    outcome = {"state": info.state, "exit_status": info.exit_status, "message": info.message, "ranks": []}
    write_atomic(run.outcome, json.dumps({**outcome, "finished_s": info.finished_s}))


def apply_outcome(info: pb.RunInfo, outcome: dict[str, Any] | None) -> None:
    """Set how the run ended, as outcome.json has it."""
    if outcome is None or outcome.get("state") not in FINAL_STATES:
        return
    for key in ("state", "exit_status", "message", "finished_s"):
        _take(info, key, outcome.get(key))


def _take(info: pb.RunInfo, key: str, value: object) -> None:
    if value is None:
        return
    try:
        setattr(info, key, value)
    except (TypeError, ValueError):
        return  # written by hand or by another version: that one value stays unknown


def _folder_time_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def run_folders(parents: Iterable[Path]) -> list[RunFolder]:
    """Return the runs in these folders, newest first."""
    found: dict[Path, float] = {}
    for parent in parents:
        for spec in parent.glob("*/run.json"):
            started_s = (read_json(spec) or {}).get("started_s")
            known = isinstance(started_s, (int, float))
            found[spec.parent] = float(started_s) if known and started_s else _folder_time_s(spec.parent)
    return [RunFolder(path) for path in sorted(found, key=lambda path: (found[path], path.name), reverse=True)]


def find_run(run_id_or_path: str | None, runs_dir: Path) -> RunFolder:
    """Return a run by its id, a unique beginning of one, or its folder; the newest without an argument.

    Raises: UserError, with the names that are near.
    """
    if run_id_or_path and (path := Path(run_id_or_path)).is_dir() and (path / "run.json").exists():
        return RunFolder(path.resolve())
    return choose_run(run_id_or_path or "", run_folders([runs_dir]), f"in {runs_dir}")


def choose_run(name: str, runs: list[RunFolder], where: str) -> RunFolder:
    """Return the run of `runs`, newest first, whose id is or begins with `name`; "" is the newest.

    Raises: UserError.
    """
    if not runs:
        raise UserError(
            f"there is no run {name}" if name else "there is no run yet",
            f"nothing was launched {where}",
            "distui launch script.py starts one, distui demo shows one",
        )
    if not name:
        return runs[0]
    ids = [run.run_id for run in runs]
    matching = [run for run in runs if run.run_id.startswith(name)]
    exact = [run for run in matching if run.run_id == name]
    if len(exact or matching) == 1:
        return (exact or matching)[0]
    if matching:
        shown = ", ".join(run.run_id for run in matching[:_LISTED])
        raise UserError(f"{name!r} is not one run", f"{len(matching)} begin with it: {shown}", "give more of the name")
    near = difflib.get_close_matches(name, ids, n=_LISTED, cutoff=0.4) or ids[:_LISTED]
    raise UserError(
        f"there is no run {name!r}", f"{len(runs)} are {where}", f"did you mean one of these: {', '.join(near)}"
    )
