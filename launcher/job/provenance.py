"""Where a run comes from: host, versions, folder, commit, where each setting that is no default was set, which run."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distui.core.config.schema import Config
from distui.core.errors import DistuiError
from distui.core.paths import RunFolder, is_run_id, read_json

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
GIT_S = 2.0
"""How long a start waits for git: a huge repository costs the line, not the launch."""


def provenance(folder: Path, origins: Mapping[str, str]) -> dict[str, object]:
    """Return what run.json keeps of it; a part that cannot be found out is left out."""
    versions = {"distui": str(sys.modules["distui"].__version__), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)  # without an import
        except PackageNotFoundError:
            continue
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "folder": str(folder),
        "versions": versions,
        "git": git_state(folder),
        "origins": {key: origin for key, origin in origins.items() if origin != "default"},
    }


def earlier(config: Config, runs: Path, slurm_job: str) -> dict[str, object] | None:
    """Return what run.json keeps of the run in folder `runs` that this one goes on from; None where it begins anew.

    It is the one that saved the newest checkpoint of `checkpoint.dir`, or the last one of the same Slurm job. Its
    account of time and restarts goes on in this one.
    """
    if config.checkpoint.resume != "always" or not config.telemetry.enabled:
        return None
    known = _saved_by(config) or _of_slurm_job(runs, slurm_job)
    run = RunFolder(runs / known) if is_run_id(known) else None
    if run is None or read_json(run.spec) is None:
        return None
    from distui.launcher.job.daemon_client import snapshot_of

    try:
        found = snapshot_of(run)
    except (DistuiError, OSError) as error:  # this run's own account is then all there is
        print(f"distui: what {known} took is not known: {error}", file=sys.stderr)
        return None
    if found.run.state not in ("failed", "stopped") or not found.HasField("effort"):
        return None
    seen_s = max((rank.last_seen_s for rank in found.ranks), default=found.run.started_s)  # it may have told nobody
    return {
        "run": known,
        "effort": {field.name: getattr(found.effort, field.name) for field in found.effort.DESCRIPTOR.fields},
        "ended_s": found.run.finished_s if found.run.HasField("finished_s") else seen_s,
        "step": max((rank.step for rank in found.ranks), default=0),
        "restarts": found.run.restarts + 1,
    }


def _saved_by(config: Config) -> str:
    newest: tuple[float, str] = (0.0, "")
    for path in Path(config.checkpoint.dir).glob("step_*/manifest.json") if config.checkpoint.dir else ():
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            newest = max(newest, (float(manifest["saved_at_s"]), str(manifest["run"])))
    return newest[1]


def _of_slurm_job(runs: Path, job: str) -> str:
    specs = [(run, read_json(run.spec) or {}) for run in map(RunFolder, runs.glob("*"))] if job else []
    of_job = [(float(spec["started_s"]), run.run_id) for run, spec in specs if spec.get("slurm_job") == job]
    return max(of_job, default=(0.0, ""))[1]


def git_state(folder: Path) -> dict[str, object]:
    """Return the commit that `folder` is at and whether tracked files differ from it; empty outside of a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {} if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking must not touch the repository
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_S, env=environ
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
