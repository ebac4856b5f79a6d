"""Finds a run's folder by its id, a beginning of it, or a path."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.paths import RunFolder


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """Return the runs kept in `runs_dir`, newest first."""
    try:
        folders = [RunFolder(path) for path in runs_dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    found = [(began_s, run) for run in folders if (began_s := _began_s(run)) is not None]
    return [run for _, run in sorted(found, key=lambda item: (item[0], item[1].run_id), reverse=True)]


def find_run(run_id_or_path: str | None, runs_dir: Path) -> RunFolder:
    """Return the run of that id, of an id that begins so and no other does, or in that folder; None or "": the newest.

    Raises: UserError, with near names, where there is none or more than one.
    """
    if run_id_or_path and "/" in run_id_or_path:
        return _at_path(Path(run_id_or_path).expanduser())
    runs = list_runs(runs_dir)
    if not run_id_or_path:
        if not runs:
            raise UserError("there is no run", f"{runs_dir} holds none", "start one: distui launch script.py")
        return runs[0]
    matches = [run for run in runs if run.run_id == run_id_or_path] or [
        run for run in runs if run.run_id.startswith(run_id_or_path)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.run_id for run in matches[:5])
        raise UserError(
            f"{run_id_or_path!r} names {len(matches)} runs",
            f"{names}{', ...' if len(matches) > 5 else ''}",
            "add letters",
        )
    if (path := Path(run_id_or_path)).is_dir():
        return _at_path(path)
    near = difflib.get_close_matches(run_id_or_path, [run.run_id for run in runs], n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else "give the id of a run, a beginning of one, or its folder"
    raise UserError(f"there is no run {run_id_or_path!r}", f"{runs_dir} holds {len(runs)}, none so named", fix)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file `path`; empty where it is missing or cannot be read as one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _at_path(path: Path) -> RunFolder:
    run = RunFolder(path.resolve())
    if _began_s(run) is None:
        raise UserError(
            f"{path} is no run",
            f"it holds neither {run.spec.name} nor {run.telemetry.name}/",
            "give a run's folder or id",
        )
    return run


def _began_s(run: RunFolder) -> float | None:
    """Return when the run began; None where the folder is none of a run. run.json is written once, at the start."""
    for path in (run.spec, run.telemetry):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return None
