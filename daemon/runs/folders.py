"""Finding runs on disk, and what run.json and outcome.json say of them."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distui.core.errors import NotOwn, UserError
from distui.core.paths import RunFolder, check_run_id, is_run_id, open_own, own_folder, read_json, write_own
from distui.core.telemetry.harmless import harmless
from distui.daemon.runs.batches import MAX_RANKS
from distui.proto import telemetry_pb2 as pb

FINAL_STATES = frozenset({"finished", "failed", "stopped"})
_LISTED = 5
_MAX_TIME_S = 1e11


def read_info(run: RunFolder) -> pb.RunInfo:
    """Return what run.json and outcome.json say; `state` is "" where there is no outcome."""
    info = pb.RunInfo(run_id=run.run_id, run_dir=str(run.path))
    if (spec := read_json(run.spec)) is not None:
        for key in ("name", "strategy", "config_toml", "started_s", "world_size", "num_nodes"):
            _take(info, key, spec.get(key))
        command, planned = spec.get("command"), spec.get("planned_memory_bytes")
        info.command.extend(harmless(str(word)) for word in (command if isinstance(command, list) else ()))
        for category, num_bytes in planned.items() if isinstance(planned, dict) else ():
            if isinstance(num_bytes, int) and 0 <= num_bytes < 1 << 63:
                info.planned_memory_bytes[harmless(category)] = num_bytes
    info.world_size = min(info.world_size, MAX_RANKS)
    if not info.started_s:
        info.started_s = _folder_time_s(run.path)
    apply_outcome(info, read_outcome(run))
    return info


def read_earlier(run: RunFolder) -> dict[str, Any] | None:
    """Return what run.json says of the run that this one goes on from; None where there is none."""
    found: Any = (read_json(run.spec) or {}).get("earlier")
    try:
        numbers = [*found["effort"].values(), found["ended_s"], found["step"], found["restarts"]]
        return found if all(isinstance(number, (int, float)) and number >= 0 for number in numbers) else None
    except (TypeError, KeyError, AttributeError):
        return None


def read_outcome(run: RunFolder) -> dict[str, Any]:
    """Return outcome.json with `ranks` and `failed_rank` of the types they should have; empty where there is none."""
    found = read_json(run.outcome)
    if found is None or not isinstance(found.get("state"), str):
        return {}
    ranks, failed = found.get("ranks"), found.get("failed_rank")
    known = [one for one in ranks if isinstance(one, dict)] if isinstance(ranks, list) else []
    return {
        **found,
        "ranks": [one for one in known if isinstance(one.get("rank"), int)],
        "failed_rank": failed if isinstance(failed, int) else None,
    }


def read_ending(run: RunFolder) -> dict[str, Any]:
    """Return ending.json with `stopped_by` and `ranks` of the types they should have; empty where there is none."""
    if (found := read_json(run.ending)) is None:
        return {}
    ranks = found.get("ranks")
    known = [one for one in ranks if isinstance(one, dict)] if isinstance(ranks, list) else []
    return {
        "stopped_by": harmless(str(found.get("stopped_by") or "")),
        "ranks": [one for one in known if isinstance(one.get("rank"), int)],
    }


def write_outcome(run: RunFolder, info: pb.RunInfo) -> None:
    """Write how a run ended that another node's daemon has forwarded; on its own node the launcher does."""
    outcome = {"state": info.state, "exit_status": info.exit_status, "message": info.message, "ranks": []}
    write_own(run.outcome, json.dumps({**outcome, "finished_s": info.finished_s}))


def apply_outcome(info: pb.RunInfo, outcome: dict[str, Any]) -> None:
    """Set how the run ended, as `read_outcome` has it."""
    if outcome.get("state") not in FINAL_STATES:
        return
    for key in ("state", "exit_status", "message", "finished_s"):
        _take(info, key, outcome.get(key))


def _take(info: pb.RunInfo, key: str, value: object) -> None:
    if value is None:
        return
    try:
        setattr(info, key, harmless(value, lines=key == "config_toml") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return  # written by hand or by another version: that one value stays unknown


def _folder_time_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def run_folders(parents: Iterable[Path]) -> list[RunFolder]:
    """Return the runs of this user in these folders, newest first. What others have put there does not count."""
    found = {run.path: started_s(run) for parent in parents for run in _runs_in(parent)}
    return [RunFolder(path) for path in sorted(found, key=lambda path: (found[path], path.name), reverse=True)]


def started_s(run: RunFolder) -> float:
    """Return when a run began, as it says itself, or its folder where that says nothing. Units: Unix seconds."""
    said = (read_json(run.spec) or {}).get("started_s")
    return float(said) if isinstance(said, (int, float)) and 0 < said < _MAX_TIME_S else _folder_time_s(run.path)


def _runs_in(parent: Path) -> Iterator[RunFolder]:
    try:
        names = os.listdir(parent)
    except OSError:
        return  # there is none yet
    for name in filter(is_run_id, names):
        run = RunFolder(parent / name)
        try:
            check_run(run)
        except OSError:
            continue
        yield run


def _refused(parent: Path) -> RunFolder | None:
    """Return a run of this user that does not count, since others may write in it; None where there is none."""
    for name in filter(is_run_id, sorted(os.listdir(parent)) if parent.is_dir() else ()):
        try:
            check_run(RunFolder(parent / name))
        except NotOwn:
            if (parent / name).lstat().st_uid == os.geteuid() and os.path.lexists(parent / name / "run.json"):
                return RunFolder(parent / name)
        except OSError:
            continue  # no run at all
    return None


def check_run(run: RunFolder) -> None:
    """Do nothing where there is a run of this user. Raises: NotOwn; OSError."""
    with own_folder(run.path):
        os.close(open_own(run.spec))


def find_run(name_or_folder: str | None, runs_dir: Path) -> RunFolder:
    """Return a run by its id, a unique beginning of one, or its folder; the newest without an argument.

    A folder is written with a slash, so that what lies in the working directory never stands for a run that is named.
    Raises: UserError, with the names that are near.
    """
    name = name_or_folder or ""
    if os.sep in name:
        run = RunFolder(Path(os.path.realpath(name)))  # unlike `resolve`, it takes links that go round
        check_run_id(run.run_id)
    else:
        check_run_id(name or "newest")
        try:
            return choose_run(name, run_folders([runs_dir]), f"in {runs_dir}")
        except UserError:
            refused = RunFolder(runs_dir / name) if name else _refused(runs_dir)
            if refused is None or not os.path.lexists(refused.path):
                raise
            run = refused
    try:
        check_run(run)
    except NotOwn as error:
        raise error.told() from error
    except OSError as error:
        raise UserError(
            f"{run.path} is the folder of no run", f"run.json: {error.strerror}", "distui status names the newest run"
        ) from error
    return run


def choose_run(name: str, runs: list[RunFolder], where: str) -> RunFolder:
    """Return the run of `runs`, newest first, whose id is or begins with `name`; "" is the newest.

    Raises: UserError.
    """
    if name:
        check_run_id(name)
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
        f"there is no run {name!r}",
        f"{len(runs)} {'is' if len(runs) == 1 else 'are'} {where}",
        f"did you mean one of these: {', '.join(near)}",
    )
