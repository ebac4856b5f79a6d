"""A state folder of the test's own for real launches, and what they printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from distui.core.paths import RunFolder

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 280.0
"""For a launch, on a machine with much else to do; less than what a test has."""
STEPS_SCRIPT = '''
"""Trains a line; writes what each step was with; kills, raises or waits where it is told to."""
import json, os, signal, sys, time
import torch
import distui

options = json.loads(sys.argv[1])
engine = distui.Engine()
rank, attempt = engine.process_index, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
data = torch.utils.data.TensorDataset(torch.arange(96.0).reshape(24, 4) / 96)
order = torch.Generator().manual_seed(3)
loader = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=order)
model, optimizer, loader, scheduler = engine.prepare(model, optimizer, loader, scheduler)
print(f"rank {rank} on {os.uname().nodename}", flush=True)
with open(f"{options['out']}-{rank}.jsonl", "a") as out:
    for epoch in range(options.get("epochs", 3)):
        for (batch,) in loader:
            loss = (model(batch) - 1).square().mean()
            engine.backward(loss)
            optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            optimizer.zero_grad()
            step = engine.clock.step
            told = {"attempt": attempt, "epoch": epoch, "step": step, "loss": loss.item(), "lr": rate}
            out.write(json.dumps(told | {"batch": batch.tolist()}) + "\\n")
            out.flush()
            if attempt == 0 and step == options.get("kill") and rank == options.get("rank", 1):
                engine.saver.wait()
                os.kill(int(os.environ[options["victim"]]) if "victim" in options else os.getpid(), signal.SIGKILL)
                signal.pause()  # an agent takes its ranks along
            if step == options.get("raise") and rank == options.get("rank", 1):
                raise ValueError("a bad batch")
            time.sleep(options.get("pause_s", 0.0))
        with torch.no_grad():
            model.eval()
            for (batch,) in torch.utils.data.DataLoader(data, 8, shuffle=True):  # an evaluation that draws
                model(batch)
            model.train()
'''
"""Its state is all that a checkpoint has: weights, moments, schedule, order, random numbers (dropout)."""


@dataclass(frozen=True)
class Place:
    """Where a test's processes keep their runs, sockets and scripts."""

    path: Path
    environ: dict[str, str]

    def distui(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `distui` here to its end."""
        return subprocess.run(
            [sys.executable, "-m", "distui", *words],
            cwd=self.path,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def runs(self) -> list[RunFolder]:
        """Return the runs, oldest first."""
        folders = (self.path / "state" / "runs").glob("*")
        return [RunFolder(path) for path in sorted(folders, key=lambda path: path.stat().st_ctime)]

    def steps(self, out: str, rank: int) -> list[dict[str, Any]]:
        """Return what `STEPS_SCRIPT` wrote, a step each."""
        return [json.loads(line) for line in (self.path / f"{out}-{rank}.jsonl").read_text().splitlines()]


def last_of_each(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each step as the last attempt that came to it had it, without the attempt's number."""
    found = {one["step"]: {key: value for key, value in one.items() if key != "attempt"} for one in steps}
    return [found[step] for step in sorted(found)]


@pytest.fixture
def place() -> Iterator[Place]:
    """Give a place of its own; the daemon that it starts is ended with the test. Its path is short, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="dtc", dir="/tmp"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(path / "state"), "DISTUI_RUNTIME_DIR": str(path / "rt"), "DISTUI_NO_TUI": "1"}
    environ["OMP_NUM_THREADS"] = "1"
    (path / "steps.py").write_text(STEPS_SCRIPT)
    yield Place(path, environ)
    lock = path / "rt" / "daemon.lock"
    if lock.exists() and (pid := lock.read_text().strip()).isdigit() and psutil.pid_exists(int(pid)):
        daemon = psutil.Process(int(pid))
        daemon.terminate()
        daemon.wait(30)
    shutil.rmtree(path, ignore_errors=True)
