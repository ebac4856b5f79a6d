"""The main job, end to end: real launches of the example with the real daemon; set up, train, watch, act, break."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.glance import wait_for_status

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_bytes.py"
SMALL = ["--layers", "2", "--dim", "64", "--context", "64", "--batch", "12"]
PACED = """
import itertools, time
import distui, torch

engine = distui.Engine()
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters()))
for _ in itertools.count():
    time.sleep(0.05)  # as a slow loader: the processors are for the commands about this job
    engine.backward(model(torch.randn(8, 64)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
"""
TOLERANCE = 1e-4


class Home:
    """A state folder of its own, and `distui` as a real process in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
        self.environ |= {"DISTUI_STATE_DIR": str(path / "state"), "DISTUI_RUNTIME_DIR": str(path / "rt")}
        self.environ |= {"OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `distui arguments`."""
        return subprocess.Popen(
            [sys.executable, "-m", "distui", *arguments],
            cwd=self.path,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def paced(self) -> Path:
        """Return a script that trains until it is told to stop."""
        script = self.path / "paced.py"
        script.write_text(PACED)
        return script

    @contextmanager
    def job(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Launch on two ranks with `arguments`; what is left of it is killed at the end."""
        process = self.start("launch", "--nproc", "2", *arguments)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run `distui arguments` to its end: exit status, stdout, stderr."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def status(self) -> dict[str, Any]:
        """Return what `distui status --json` prints of the newest run."""
        code, out, err = self.run("status", "--json")
        assert code == 0, err
        return dict(json.loads(out))

    def daemon(self) -> psutil.Process:
        """Return this home's daemon."""
        runtime = self.environ["DISTUI_RUNTIME_DIR"]
        for process in psutil.process_iter(["cmdline"]):
            try:
                ours = process.environ().get("DISTUI_RUNTIME_DIR") == runtime
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
            if ours and "distui.daemon" in (process.info["cmdline"] or ()):
                return process
        raise AssertionError("no daemon runs")

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for the status until `condition` holds."""
        return wait_for_status(self.environ, condition)


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    path = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    home = Home(path)
    yield home
    try:
        daemon = home.daemon()
    except AssertionError:
        pass  # the last test may have ended it
    else:
        daemon.terminate()
        daemon.wait(120)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def plain_losses(home: Home) -> list[float]:
    """The losses of the plain PyTorch script."""
    file = home.path / "plain.json"
    command = [
        sys.executable,
        str(EXAMPLE.with_name("train_bytes_torch.py")),
        "--steps",
        "20",
        "--loss-file",
        str(file),
    ]
    subprocess.run([*command, *SMALL], check=True, env=home.environ, capture_output=True)
    losses: list[float] = json.loads(file.read_text())
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    return losses


@pytest.mark.parametrize("stage", [3])  # tests/dist has all of them, in processes that are warm
def test_a_launch_gives_the_losses_of_plain_torch(home: Home, plain_losses: list[float], stage: int) -> None:
    file = home.path / f"zero{stage}.json"
    arguments = ["--steps", "20", "--loss-file", str(file), *SMALL]
    code, out, err = home.run("launch", "--nproc", "2", "--zero", str(stage), str(EXAMPLE), *arguments)
    assert code == 0, err
    losses = json.loads(file.read_text())
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) <= TOLERANCE
    assert "step    20" in out and "finished" in err and "distui monitor" in err
    status = home.status()
    assert status["state"] == "finished" and status["dropped"] == 0 and status["diagnosis"] == []
    assert status["strategy"] == f"ZeRO-{stage}, fp32"
    assert [rank["step"] for rank in status["ranks"]] == [20, 20]
    assert sum(rank["loss"] for rank in status["ranks"]) / 2 == pytest.approx(losses[-1], abs=1e-3)
    assert set(status["ranks"][0]) == {
        "rank", "node", "pid", "state", "busy", "step", "loss", "step_s", "tokens_per_s",
        "samples_per_s", "memory_bytes"
    }  # fmt: skip


def test_setup_writes_a_config_that_launch_takes(home: Home, plain_losses: list[float]) -> None:
    config = home.path / "distui.toml"
    code, _, err = home.run("setup", "--yes", "--nproc", "2", "--config", str(config))
    assert code == 0, err
    code, _, err = home.run("launch", "--config", str(config), str(EXAMPLE), "--steps", "3", *SMALL)
    assert code == 0, err
    assert len(home.status()["ranks"]) == 2


def test_a_killed_daemon_costs_the_job_nothing_and_loses_no_step(home: Home) -> None:
    with home.job("--zero", "2", str(home.paced())) as job:
        run = home.wait_until(lambda found: found["state"] == "running" and (found["ranks"][0]["step"] or 0) > 5)["run"]
        first = home.daemon()
        first.send_signal(signal.SIGKILL)
        first.wait(120)
        # The launcher starts another one; the ranks find it, some time, and send what is missing.
        deadline, code = time.monotonic() + 120, -1
        while code != 0:
            code, out, err = home.run("control", run, "stacks")
            assert code == 0 or time.monotonic() < deadline, err
        assert home.daemon().pid != first.pid
        assert "engine.py" in out or "paced.py" in out, "each rank's Python stack"
        steps = [rank["step"] for rank in home.status()["ranks"]]
        home.wait_until(
            lambda found: all(rank["step"] > step + 40 for rank, step in zip(found["ranks"], steps, strict=True))
        )
        code, out, err = home.run("control", run, "stop")
        assert code == 0, out + err
        _, err = job.communicate(timeout=180)
        assert job.returncode == 143, err
    status = home.status()
    assert status["state"] == "stopped" and status["dropped"] == 0
    # What a rank did while it was being stopped may not have come so far as to the log.
    kept = _kept_steps(home.path / "state" / "runs" / run)
    for rank, step in enumerate(steps):
        assert kept[rank] == list(range(1, len(kept[rank]) + 1)) and len(kept[rank]) >= step > 5


def _kept_steps(run: Path) -> dict[int, list[int]]:
    from distui.core.paths import RunFolder
    from distui.daemon.runs.store import read_batches

    kept: dict[int, list[int]] = {}
    for batch in read_batches(RunFolder(run)):
        for record in batch.records:
            if record.WhichOneof("body") == "step":
                kept.setdefault(batch.source.rank, []).append(record.step.step)
    return kept


def test_a_running_job_saves_profiles_and_stops_when_told(home: Home) -> None:
    with home.job("--zero", "3", str(home.paced())) as job:
        run = home.wait_until(lambda found: found["state"] == "running" and (found["ranks"][0]["step"] or 0) > 2)["run"]
        folder = home.path / "state" / "runs" / run
        code, out, err = home.run("control", run, "checkpoint")
        assert code == 0, out + err
        assert out.count("rank 0: accepted") == out.count("rank 1: accepted") == 1
        (checkpoint,) = (folder / "checkpoints").glob("step_*")
        code, out, err = home.run("checkpoint", "inspect", str(checkpoint))
        assert code == 0 and "all checksums match" in out, err
        code, out, err = home.run("control", run, "profile", "--steps", "2")
        assert code == 0 and out.count("done: wrote") == 2, out + err
        for rank in range(2):  # a Chrome trace
            trace = json.loads((folder / "profile" / f"rank{rank}.json").read_text())
            complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
            assert complete and all(event["dur"] >= 0 and "ts" in event and "pid" in event for event in complete)
        code, out, err = home.run("control", run, "log-level", "--level", "debug")
        assert code == 0 and out.count("the root logger is at DEBUG") == 2, out + err
        code, out, err = home.run("control", run, "stop")
        assert code == 0 and job.wait(120) == 143, out + err


def _job_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("DISTUI_JOB", "")
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return ""


def test_a_failing_rank_is_named_with_its_traceback(home: Home) -> None:
    script = home.path / "failing.py"
    script.write_text(
        "import distui, torch\n"
        "engine = distui.Engine()\n"
        "model = torch.nn.Linear(2, 2)\n"
        "model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "for step in range(5):\n"
        "    engine.backward(model(torch.ones(1, 2)).sum()); optimizer.step(); optimizer.zero_grad()\n"
        "if engine.process_index == 1:\n"
        "    raise ZeroDivisionError('the data is bad')\n"
        "engine.wait_for_everyone()\n"
    )
    code, _, err = home.run("launch", "--nproc", "2", str(script))
    assert code == 3
    assert "rank 1" in err and "ZeroDivisionError: the data is bad" in err and "step 5" in err and "rank1.log" in err
    assert home.status()["state"] == "failed"


TORCHRUN_SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)  # a second optimizer is not a second step
for _ in range(7):
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    other.step()
    optimizer.zero_grad()
if dist.get_rank() == 1:
    names = [name for name in os.environ if name.startswith("TORCHELASTIC_")]
    names += ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    with open(sys.argv[1], "w") as file:
        json.dump({name: os.environ[name] for name in names}, file)
print("torchrun's script is done")
dist.destroy_process_group()
"""


def test_a_torchrun_script_runs_unchanged_and_is_seen(home: Home) -> None:
    script, told = home.path / "torchrun_script.py", home.path / "environ.json"
    script.write_text(TORCHRUN_SCRIPT)
    code, _, err = home.run("launch", "--nproc", "2", str(script), str(told))
    assert code == 0, err
    environ = json.loads(told.read_text())
    assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["1", "1", "2", "2"]
    assert environ["MASTER_ADDR"] and environ["MASTER_PORT"].isdecimal() and environ["TORCHELASTIC_RUN_ID"]
    status = home.status()
    assert status["state"] == "finished" and status["strategy"] == "the script's own strategy"
    for rank in status["ranks"]:
        assert rank["step"] == 7 and rank["step_s"] > 0 and rank["memory_bytes"] > 0
        assert rank["loss"] is None and rank["tokens_per_s"] is None, "what nobody told is not known"
    logs = sorted((home.path / "state" / "runs" / status["run"] / "logs").glob("rank*.log"))
    assert [log.read_text().count("torchrun's script is done") for log in logs] == [1, 1]


def test_a_read_only_job_refuses_all_but_stacks(home: Home) -> None:
    script = home.path / "plain.py"
    script.write_text(
        "import torch, time, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "while True:\n    dist.all_reduce(torch.ones(4))\n    time.sleep(0.02)\n"
    )
    with home.job("--no-tui", "--set", "telemetry.control=false", str(script)) as job:
        found = home.wait_until(lambda found: len(found["ranks"]) == 2 and found["state"] in ("running", "starting"))
        code, out, err = home.run("control", found["run"], "stop")
        assert code == 2 and "read-only" in err and "telemetry.control=true" in err, out + err
        code, out, err = home.run("control", found["run"], "stacks")
        assert code == 0 and "plain.py" in out, err
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=180)
        assert job.returncode == 130, err
    assert home.status()["state"] == "stopped"
    run = found["run"]
    left = [p.pid for p in psutil.process_iter() if p.pid != os.getpid() and _job_of(p) and run in _job_of(p)]
    assert not left
