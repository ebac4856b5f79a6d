"""Jobs in the background: started there, left there, found, looked at, followed to their end, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distui.core.paths import RunFolder
from distui.launcher.job.attached import agent_of

WAITS = """
import sys
print("begun", flush=True)
open(sys.argv[1]).read()  # a FIFO: until somebody writes
print("ended", flush=True)
sys.exit(int(sys.argv[2]))
"""
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def fifo(home: Any, distui: Callable[..., Done], request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give what a script waits for; what still waits after the test is stopped."""
    home.script("waits.py", WAITS)
    path = Path(home.path) / f"{request.node.name[:20]}.fifo"
    os.mkfifo(path)
    yield path
    for run_id in states(distui, "--running"):
        distui("stop", run_id)


def process(home: Any, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
    environ = {"DISTUI_TELEMETRY_ENABLED": "false", **home.environ}
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [sys.executable, "-m", "distui", *arguments]
    return subprocess.Popen(command, cwd=home.path, env=environ, text=True, **given)


def states(distui: Callable[..., Done], *arguments: str) -> dict[str, str]:
    listed = json.loads(distui("runs", "--json", *arguments).stdout)["runs"]
    return {row["run"]: row["state"] for row in listed}


def test_a_detached_job_is_listed_followed_attached_to_and_has_an_exit_status(
    home: Any, distui: Callable[..., Done], fifo: Path
) -> None:
    started = distui("launch", "--detach", "--nproc", "1", "waits.py", str(fifo), "7")
    run_id = started.stdout.strip()
    assert started.returncode == 0 and f"distui attach {run_id}" in started.stderr
    logs = process(home, "logs", run_id, "-f")
    assert logs.stdout is not None
    assert logs.stdout.readline() == "begun\n", logs.communicate(timeout=60)
    assert states(distui, "--running") == {run_id: "running"}
    attached = process(home, "attach", run_id)
    assert attached.stderr is not None and run_id in attached.stderr.readline()
    fifo.write_text("go")
    assert logs.communicate(timeout=180)[0] == "ended\n" and logs.returncode == 0
    out, err = attached.communicate(timeout=180)
    assert out == "ended\n" and "failed" in err and attached.returncode == 3
    assert states(distui)[run_id] == "failed" and run_id not in states(distui, "--running")
    assert distui("logs", run_id, "-n", "1").stdout == "ended\n"
    assert run_id in distui("runs").stdout
    refused = distui("attach", run_id)
    assert refused.returncode == 2 and f"distui monitor {run_id}" in refused.stderr


def test_a_job_is_stopped_by_its_name_from_anywhere(home: Any, distui: Callable[..., Done], fifo: Path) -> None:
    run_id = distui("launch", "--detach", "--nproc", "1", "waits.py", str(fifo), "0").stdout.strip()
    logs = process(home, "logs", run_id, "-f")
    assert logs.stdout is not None and logs.stdout.readline() == "begun\n"
    stopped = distui("stop", run_id)
    assert (stopped.returncode, stopped.stdout) == (0, f"{run_id}: stopped\n")
    assert logs.communicate(timeout=180) and logs.returncode == 0
    again = distui("stop", run_id)
    assert again.returncode == 2 and "has ended" in again.stderr


class Screen:
    """`distui launch` on a terminal of its own."""

    def __init__(self, home: Any, *arguments: str, hangup: signal.Handlers = signal.SIG_DFL) -> None:
        self.ours, theirs = os.openpty()
        environ = {**home.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        command = [sys.executable, "-c", "import sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
                   "from distui.launcher.cli import main; main()", *arguments]  # fmt: skip
        streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        streams["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, hangup)  # the tests may run under nohup
        self.process = subprocess.Popen(command, cwd=home.path, env=environ, start_new_session=True, **streams)
        os.close(theirs)

    def read_until(self, words: bytes) -> None:
        seen = b""
        while words not in seen:
            seen += os.read(self.ours, 65536)


def test_q_leaves_the_job_which_outlives_its_terminal(home: Any, distui: Callable[..., Done], fifo: Path) -> None:
    screen = Screen(home, "launch", "--nproc", "1", "--name", "left", "waits.py", str(fifo), "0")
    screen.read_until(b"Overview")
    os.write(screen.ours, b"q")
    screen.read_until(b"goes on in the background")
    assert screen.process.wait(120) == 0
    os.close(screen.ours)
    run: RunFolder = home.run_named("left")
    assert agent_of(run) is not None and states(distui, "--running") == {run.run_id: "running"}
    attached = process(home, "attach", run.run_id)
    assert attached.stderr is not None and run.run_id in attached.stderr.readline()
    fifo.write_text("go")
    assert attached.communicate(timeout=180) and attached.returncode == 0 and states(distui)[run.run_id] == "finished"


def test_a_closed_terminal_ends_a_job_that_was_not_left(home: Any, distui: Callable[..., Done], fifo: Path) -> None:
    screen = Screen(home, "launch", "--nproc", "1", "--name", "closed", "waits.py", str(fifo), "0")
    screen.read_until(b"Overview")
    run: RunFolder = home.run_named("closed")
    agent = agent_of(run)
    assert agent is not None
    watched = psutil.Process(agent)
    os.close(screen.ours)
    watched.wait(120)
    screen.process.wait(120)
    deadline = time.monotonic() + 120
    while states(distui)[run.run_id] == "running" and time.monotonic() < deadline:
        continue
    assert states(distui)[run.run_id] == "stopped"


def test_under_nohup_a_closed_terminal_leaves_the_job(home: Any, distui: Callable[..., Done], fifo: Path) -> None:
    words = ("launch", "--nproc", "1", "--name", "nohup", "waits.py", str(fifo), "0")
    screen = Screen(home, *words, hangup=signal.SIG_IGN)
    screen.read_until(b"Overview")
    run: RunFolder = home.run_named("nohup")
    os.close(screen.ours)
    assert screen.process.wait(120) == 0
    assert states(distui, "--running") == {run.run_id: "running"}
    watching = Screen(home, "monitor", run.run_id, hangup=signal.SIG_IGN)
    watching.read_until(b"Overview")
    os.close(watching.ours)
    assert watching.process.wait(120) == 0
    assert distui("stop", run.run_id, "--now").returncode == 0


def test_what_an_agent_is_just_starting_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has its parent's command line until it has its own, and a lower number once numbers have wrapped."""
    forks = "import os, sys; os.fork() and print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", forks, "distui.launcher.node.agent", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None and agent.stdout.readline()
        numbers = os.listdir("/proc")
        for order in (numbers, numbers[::-1]):
            monkeypatch.setattr("os.listdir", lambda path, order=order: order)
            assert agent_of(RunFolder(tmp_path)) == agent.pid
        monkeypatch.undo()
        agent.communicate()
