"""Nothing of a job outlives it: Ctrl-C, kills of every process of the launcher, and ranks that resist."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distui.core.paths import RunFolder
from distui.launcher.job.processes import job_processes

STUBBORN = """
import os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]
modes = sys.argv[1 + rank].split("+")
children = []
if "children" in modes:
    children.append(subprocess.Popen(sleep, start_new_session=True).pid)  # keeps the environment
    children.append(subprocess.Popen(sleep, env={}).pid)  # keeps the session
    children.append(os.fork())
    if children[-1] == 0:
        time.sleep(60)
if "ignore" in modes:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(f"ready.{rank}.new", "w") as file:
    file.write(" ".join(map(str, [os.getpid(), *children])))
os.rename(f"ready.{rank}.new", f"ready.{rank}")
if "stop" in modes:
    os.kill(os.getpid(), signal.SIGSTOP)
if "raise-when-told" in modes:
    while not os.path.exists("go"):
        time.sleep(0.02)
    raise RuntimeError("told to")
time.sleep(60)
"""


class Started:
    """A running `distui launch` and every process that belongs to it."""

    def __init__(self, folder: Path, *arguments: str, nproc: int = 2) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "stubborn.py").write_text(STUBBORN)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
        environ |= {
            "DISTUI_STATE_DIR": str(folder / "state"),
            "DISTUI_RUNTIME_DIR": str(folder / "rt"),
            "DISTUI_TELEMETRY_ENABLED": "false",
        }
        command = [sys.executable, "-m", "distui", "launch", "--nproc", str(nproc), *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )
        self.pids: set[int] = set()

    def wait_ready(self, ranks: range) -> list[int]:
        """Wait until each rank has said so; return their ids."""
        deadline = time.monotonic() + 120
        while not all((self.folder / f"ready.{rank}").exists() for rank in ranks):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.05)
        found = [[int(pid) for pid in (self.folder / f"ready.{rank}").read_text().split()] for rank in ranks]
        self.pids = {pid for pids in found for pid in pids} | {self.process.pid, self.agent}
        assert {process.pid for process in job_processes(self.run)} >= self.pids - {self.process.pid, self.agent}
        return [pids[0] for pids in found]

    @property
    def run(self) -> RunFolder:
        """The folder of the run."""
        (path,) = (self.folder / "state" / "runs").iterdir()
        return RunFolder(path)

    @property
    def agent(self) -> int:
        """The agent's process id."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def alive(self) -> set[int]:
        """Return the processes of the job that are there and no zombies, our own child included."""
        found = set()
        for pid in self.pids | {process.pid for process in job_processes(self.run)}:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.add(pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def outcome(self) -> dict[str, Any]:
        """Return outcome.json."""
        found = json.loads(self.run.outcome.read_text())
        assert isinstance(found, dict)
        return found


Start = Callable[..., Started]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give `start(arguments...)`; whatever is left of the jobs at the end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    jobs: list[Started] = []

    def begin(*arguments: str, nproc: int = 2) -> Started:
        jobs.append(Started(folder / str(len(jobs)), *arguments, nproc=nproc))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.process.kill()
        job.process.communicate()
        for pid in job.alive():
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


def ends(job: Started, *signals_sent: tuple[int, signal.Signals]) -> int:
    """Send the signals and return the exit status; then nothing may be left."""
    for pid, signum in signals_sent:
        os.kill(pid, signum)
    status = job.process.wait(timeout=180)
    assert job.alive() == set()
    return status


def test_ctrl_c_ends_ranks_that_resist_and_their_children(start: Start) -> None:
    job = start("stubborn.py", "ignore+children", "stop+children")
    job.wait_ready(range(2))
    assert ends(job, (job.process.pid, signal.SIGINT)) == 130
    outcome = job.outcome()
    assert (outcome["state"], outcome["exit_status"], outcome["failed_rank"]) == ("stopped", 130, None)
    assert outcome["message"] == "stopped by SIGINT"
    assert json.loads(job.run.ending.read_text()) == {
        "stopped_by": "SIGTERM",
        "ranks": [],
    }  # which the launcher sends on
    assert {(rank["exit_status"], rank["signal"]) for rank in outcome["ranks"]} == {(None, 9)}
    told = job.process.stderr.read().decode() if job.process.stderr else ""
    assert "distui: stopped after " in told and "Traceback" not in told


def test_a_second_ctrl_c_does_not_wait_for_the_grace_period(start: Start) -> None:
    job = start("stubborn.py", "ignore", "ignore+children")
    job.wait_ready(range(2))
    os.kill(job.process.pid, signal.SIGINT)
    assert job.process.poll() is None
    time.sleep(0.3)  # two signals at once are one to the kernel
    assert ends(job, (job.process.pid, signal.SIGINT)) == 130
    assert job.outcome()["state"] == "stopped"


def test_sigterm_and_a_hangup_stop_the_job(start: Start) -> None:
    jobs = {signum: start("stubborn.py", "children", nproc=1) for signum in (signal.SIGTERM, signal.SIGHUP)}
    for signum, job in jobs.items():
        job.wait_ready(range(1))
        assert ends(job, (job.process.pid, signum)) == 128 + signum
        assert job.outcome()["state"] == "stopped"


def test_a_killed_launcher_leaves_no_rank(start: Start) -> None:
    job = start("stubborn.py", "children", "children")
    job.wait_ready(range(2))
    job.process.kill()
    job.process.wait()
    deadline = time.monotonic() + 120
    while job.alive():
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in job.alive()]
        time.sleep(0.05)
    assert job.outcome()["state"] == "stopped"


def test_a_killed_agent_leaves_no_rank_and_is_told(start: Start) -> None:
    job = start("stubborn.py", "children", "ignore")
    job.wait_ready(range(2))
    assert ends(job, (job.agent, signal.SIGKILL)) == 1
    assert job.outcome()["state"] == "failed"
    told = job.process.stderr.read().decode() if job.process.stderr else ""
    assert "agent was killed by SIGKILL" in told and "launcher.log" in told


def test_a_killed_rank_is_named_and_takes_the_others_with_it(start: Start) -> None:
    job = start("stubborn.py", "children", "children")
    ranks = job.wait_ready(range(2))
    assert ends(job, (ranks[1], signal.SIGKILL)) == 3
    (first,) = json.loads(job.run.ending.read_text())["ranks"]
    assert (first["rank"], first["signal"]) == (1, signal.SIGKILL)
    outcome = job.outcome()
    assert (outcome["failed_rank"], outcome["message"]) == (1, "rank 1: killed by SIGKILL")
    told = job.process.stderr.read().decode() if job.process.stderr else ""
    assert "error: rank 1 failed on " in told and "SIGKILL" in told and "rank 0 ended by distui" in told


def test_a_raising_rank_is_named_though_another_must_be_killed(start: Start) -> None:
    job = start("stubborn.py", "ignore+stop", "raise-when-told")
    job.wait_ready(range(2))
    (job.folder / "go").touch()
    assert ends(job) == 3
    assert job.outcome()["message"] == "rank 1: RuntimeError: told to"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def nodes(start: Start, *arguments: str) -> list[Started]:
    port = str(free_port())
    options = ["--nodes", "2", "--master-port", port]
    return [start(*options, "--node-rank", str(node), "stubborn.py", *arguments, nproc=1) for node in (1, 0)][::-1]


def test_two_nodes_meet_on_loopback_and_fail_together(start: Start) -> None:
    first, second = nodes(start, "", "raise-when-told")
    first.wait_ready(range(1))
    second.wait_ready(range(1, 2))  # global ranks follow the node's place
    (second.folder / "go").touch()
    assert second.process.wait(120) == 3
    assert ends(first) == 3
    assert second.outcome()["message"] == "rank 1: RuntimeError: told to"
    assert "rank 1: RuntimeError: told to" in first.outcome()["message"]
    assert json.loads(first.run.spec.read_text())["world_size"] == 2
