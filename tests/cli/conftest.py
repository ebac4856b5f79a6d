"""A state folder of the tests' own, and `distui` as a real process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from distui.core.paths import RunFolder

Distui = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Home:
    """Where a test's processes keep their runs, sockets and scripts."""

    path: Path
    environ: dict[str, str]

    def runs(self) -> list[RunFolder]:
        """Return every run."""
        runs = self.path / "state" / "runs"
        return [RunFolder(path) for path in sorted(runs.iterdir())] if runs.is_dir() else []

    def run_named(self, name: str) -> RunFolder:
        """Return the only run of this name."""
        (found,) = [run for run in self.runs() if run.run_id.startswith(f"{name}-2")]
        return found

    def script(self, name: str, text: str) -> Path:
        """Write a script."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    """One state folder for the session; its path is short, because sockets' paths must be."""
    path = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ.pop("OMP_NUM_THREADS", None)  # the user's own wins over what distui decides
    environ |= {"DISTUI_STATE_DIR": str(path / "state"), "DISTUI_RUNTIME_DIR": str(path / "rt")}
    yield Home(path, environ)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def distui(home: Home) -> Distui:
    """Return a function that runs `distui` to its end, in the home folder, without telemetry unless asked for."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distui", *arguments],
            cwd=home.path,
            env={"DISTUI_TELEMETRY_ENABLED": "false", **home.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=180,
        )

    return run


@pytest.fixture
def with_daemon(home: Home) -> Iterator[Home]:
    """Give the home for what has telemetry; the daemon that it starts is ended with the test."""
    yield home
    for process in psutil.process_iter():
        try:
            if process.environ().get("DISTUI_RUNTIME_DIR") == home.environ["DISTUI_RUNTIME_DIR"]:
                process.terminate()
                process.wait(120)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
