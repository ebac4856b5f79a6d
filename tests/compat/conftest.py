"""A home folder for launched scripts, as in tests/cli."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def compat_home() -> Iterator[Path]:
    """One state folder for the session; its path is short, because sockets' paths must be."""
    path = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def launch(compat_home: Path) -> Launch:
    """Return a function that runs `distui launch --no-tui ...` to its end, without telemetry."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
        environ |= {
            "DISTUI_STATE_DIR": str(compat_home / "state"),
            "DISTUI_RUNTIME_DIR": str(compat_home / "rt"),
            "DISTUI_TELEMETRY_ENABLED": "false",
        }
        return subprocess.run(
            [sys.executable, "-m", "distui", "launch", "--no-tui", *arguments],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=180,
        )

    return run
