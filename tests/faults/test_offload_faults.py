"""A disk that fills up under a job: it ends with what, why and fix, no rank hangs, and the last checkpoint is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from distui.core.checkpoint import folder as folders

SCRIPT = """
import os, sys, torch, distui
from torch import nn

engine = distui.Engine()
torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)])
model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters()))
assert not os.listdir(sys.argv[1]), "the file has no name, so a kill leaves nothing"
for step in range(6):
    engine.backward(model(torch.randn(4, 64)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    if step == 2 and engine.process_index == 1:
        (sharded,) = engine.backend._models.values()
        os.dup2(os.open("/dev/full", os.O_RDWR), sharded.homes.nvme.file.handle)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_a_disk_that_fills_up_ends_the_job_and_leaves_the_checkpoint(folder: Path) -> None:
    (folder / "train.py").write_text(SCRIPT)
    swap = folder / "swap"
    swap.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(folder / "state"), "DISTUI_RUNTIME_DIR": str(folder / "rt")}
    settings = {
        "offload.params": "nvme",
        "offload.nvme_path": str(swap),
        "checkpoint.every_steps": "1",
        "checkpoint.dir": str(folder / "saved"),
        "telemetry.enabled": "false",
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "distui", "launch", "--no-tui", "--nproc", "2", "--zero", "3", "--offload", "nvme"]
    done = subprocess.run(
        [*command, *sets, "train.py", str(swap)], cwd=folder, env=environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 3, done.stderr
    assert f"the disk at {swap} failed under offloaded states" in done.stderr
    assert "No space left on device" in done.stderr and "fix: free some space there" in done.stderr
    saved = sorted((folder / "saved").iterdir())
    assert saved[-1].name == "step_00000003"
    folders.verify(saved[-1])
    assert not list(swap.iterdir())
