"""Where a run comes from: host, versions, folder, commit, and where each setting that is no default was set."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
