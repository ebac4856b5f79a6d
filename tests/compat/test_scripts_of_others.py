"""Scripts that know nothing of distui, under `distui launch` with telemetry: Trainer and Lightning Fabric."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

TRAINER = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ids = torch.arange(12)
data = [{"input_ids": ids, "labels": ids}] * 8
shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
arguments = TrainingArguments("out", max_steps=3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
                              per_device_train_batch_size=2, gradient_accumulation_steps=2)
trainer = Trainer(LlamaForCausalLM(LlamaConfig(**shape)), arguments, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    print("last loss", [row["loss"] for row in trainer.state.log_history if "loss" in row][-1])
    print("by", type(trainer.accelerator).__name__)
"""
FABRIC = """\
import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
model = torch.nn.Linear(8, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 8)), batch_size=4)
for (x,) in fabric.setup_dataloaders(loader):
    fabric.backward(model(x).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
print("steps of rank", fabric.global_rank, "of", fabric.world_size)
"""


@pytest.fixture
def seen_home(compat_home: Path) -> Iterator[Path]:
    """The session's folder; the daemon that a launch starts there is ended."""
    yield compat_home
    for process in psutil.process_iter(["cmdline"]):
        if "distui.daemon" in (process.info["cmdline"] or ()):
            try:
                if process.environ().get("DISTUI_RUNTIME_DIR") == str(compat_home / "rt"):
                    process.terminate()
                    process.wait(120)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def _run(home: Path, script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(home / "state"), "DISTUI_RUNTIME_DIR": str(home / "rt")}
    (home / "train.py").write_text(script)

    def distui(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distui", *words],
            cwd=home,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=180,
        )

    done = distui("launch", "--no-tui", "--nproc", "2", *arguments, "train.py")
    assert done.returncode == 0, done.stderr
    status = distui("status", "--json")
    assert status.returncode == 0, status.stderr
    found: dict[str, Any] = json.loads(status.stdout)
    return done.stdout + done.stderr, found


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs Accelerate installed")
def test_a_trainer_script_runs_on_the_engine_and_is_seen(seen_home: Path) -> None:
    out, status = _run(seen_home, TRAINER, "--zero", "2")
    assert "by TrainerAccelerator" in out
    assert status["state"] == "finished"
    assert "ZeRO-2" in status["strategy"]
    assert [rank["step"] for rank in status["ranks"]] == [3, 3]
    # Micro-batches are alike, so the loss of a rank is the loss of all that Trainer logs.
    assert status["ranks"][0]["loss"] == pytest.approx(float(out.split("last loss ")[1].split()[0]), rel=1e-3)
    assert status["ranks"][0]["tokens_per_s"] > 0


@pytest.mark.skipif(importlib.util.find_spec("lightning_fabric") is None, reason="needs lightning-fabric")
def test_a_fabric_script_runs_unchanged_and_its_steps_are_seen(seen_home: Path) -> None:
    out, status = _run(seen_home, FABRIC, "--zero", "3")
    assert "distui: ZeRO-3, fp32 has no effect: the script trains without distui's engine" in out
    assert "choose it in Lightning Fabric" in out
    assert "steps of rank 0 of 2" in out
    assert status["state"] == "finished"
    assert [rank["step"] for rank in status["ranks"]] == [3, 3]
    assert all(rank["memory_bytes"] for rank in status["ranks"])
