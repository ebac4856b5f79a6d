"""`distui tune`: real launches of a script under several plans, what fails as a row, what is written, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from distui.launcher.job.processes import job_processes

Done = subprocess.CompletedProcess[str]

TRAINING = """
import signal, sys, torch, distui
engine = distui.Engine()
if engine.config.strategy.zero_stage == 3:
    raise ValueError("not under stage 3")
data = torch.utils.data.TensorDataset(torch.ones(1 << 16, 8))
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
loader = torch.utils.data.DataLoader(data, batch_size=4)
model, optimizer, loader = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
for step, (batch,) in enumerate(loader):
    if step == 3 and len(sys.argv) > 1:
        open(sys.argv[1], "w").close()  # a FIFO: whoever reads it knows that it trains
        open(sys.argv[1]).read()
    if step == 12:  # all that is measured was told
        signal.pause()
    engine.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
"""
FILE = """# mine
[checkpoint]
keep = 7  # of my own
"""


pytestmark = pytest.mark.usefixtures("with_daemon")


def test_plans_are_measured_a_failing_one_is_a_row_and_the_fastest_is_written(
    home: Any, distui: Callable[..., Done]
) -> None:
    home.script("train.py", TRAINING)
    file = home.script("mine.toml", FILE)
    words = ("--nproc", "2", "--plans", "3", "--steps", "5", "--config", "mine.toml", "--write", "--json", "train.py")
    done = distui("tune", *words)
    assert done.returncode == 0, done.stderr
    rows, last = json.loads(done.stdout), done.stderr.rpartition("the fastest is ")[2]
    (failed,) = [row for row in rows if row["reason"]]
    assert failed is rows[-1] and failed["settings"]["strategy.zero_stage"] == 3
    assert failed["reason"].startswith("failed: rank ") and "ValueError: not under stage 3" in failed["reason"]
    best, other = rows[:2]
    assert best["samples_per_s"] >= other["samples_per_s"] > 0 and (best["steps"], other["steps"]) == (5, 5)
    assert best["peak_memory_bytes"] > 0 and best["predicted_tokens_per_s"] is None
    written = file.read_text()
    assert "# mine" in written and "keep = 7  # of my own" in written
    (backup,) = [path for path in home.path.glob("mine.toml*") if path != file]
    assert backup.read_text() == FILE and str(backup) in last
    assert f"zero_stage = {best['settings']['strategy.zero_stage']}" in written
    assert not any(job_processes(run) for run in home.runs())


def test_ctrl_c_ends_the_trial_and_leaves_no_process(home: Any) -> None:
    home.script("train.py", TRAINING)
    os.mkfifo(home.path / "trains")
    tune = subprocess.Popen(
        [sys.executable, "-m", "distui", "tune", "--nproc", "1", "train.py", "trains"],
        cwd=home.path,
        env=home.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    open(home.path / "trains").close()
    tune.send_signal(signal.SIGINT)
    out, err = tune.communicate(timeout=120)
    assert tune.returncode == 130 and "plan" in out and "Traceback" not in err
    assert not any(job_processes(run) for run in home.runs())
    assert not (home.path / "distui.toml").exists()


def test_a_script_without_the_engine_cannot_be_tuned(home: Any, distui: Callable[..., Done]) -> None:
    plain = "import torch\nw = torch.ones(1, requires_grad=True)\nopt = torch.optim.SGD([w], 0.1)\n"
    home.script("plain.py", plain + "for _ in range(9):\n    (w * w).backward()\n    opt.step()\n")
    done = distui("tune", "--nproc", "1", "--plans", "1", "plain.py")
    assert done.returncode == 2 and "without distui's engine" in done.stderr and "--as accelerate" in done.stderr
