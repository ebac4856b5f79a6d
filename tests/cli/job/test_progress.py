"""How far a job is and how long the rest takes, of real ranks: status, report and the dashboard's header."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from distui.daemon.runs.snapshot import read_snapshot
from distui.launcher.report.data import read_report
from distui.launcher.report.page import facts
from distui.tui.monitor.header import progress_of

TRAINING = """
import torch, distui
engine = distui.Engine(num_epochs=3, batch={"accumulation": 2})
data = torch.utils.data.TensorDataset(torch.ones(40, 2))  # 10 batches are 5 steps
model = torch.nn.Linear(2, 1)
loader = torch.utils.data.DataLoader(data, batch_size=4)
model, optimizer, loader = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
for (batch,) in loader:
    with engine.accumulate(model):
        engine.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
"""
Done = subprocess.CompletedProcess[str]


def test_steps_to_the_end_and_samples_where_there_are_no_tokens(home: Any, distui: Callable[..., Done]) -> None:
    home.script("epochs.py", TRAINING)
    done = distui("launch", "--nproc", "1", "epochs.py", DISTUI_TELEMETRY_ENABLED="true")
    assert done.returncode == 0, done.stderr
    run = home.run_named("epochs")
    status = json.loads(distui("status", str(run.path), "--json").stdout)
    assert status["progress"] == {"step": 5, "total_steps": 15, "left_s": None}, "an ended run has no time left"
    (rank,) = status["ranks"]
    assert rank["tokens_per_s"] is None and rank["samples_per_s"] > 0
    table = distui("status", str(run.path)).stdout
    assert "step 5 of 15, 33%" in table and "samples/s" in table and "tokens/s" not in table
    assert dict(facts(read_report(run, 0.0)))["samples/s"] != "n/a"
    snapshot = read_snapshot(run)
    snapshot.left_s = 75.0
    assert progress_of(snapshot) == "5/15 33%, 1m 15s left"


BARS = """
import sys, torch, tqdm, distui
from tqdm.auto import trange
engine = distui.Engine(batch={"accumulation": 2})
data = torch.utils.data.TensorDataset(torch.ones(20, 2))  # 5 batches are 3 steps
model = torch.nn.Linear(2, 1)
loader = torch.utils.data.DataLoader(data, batch_size=4)
model, optimizer, loader = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
def train(batches):
    for (batch,) in batches:
        with engine.accumulate(model):
            engine.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if engine.sync_gradients and manual is not None:
            manual.update(1)
    for _ in tqdm.tqdm(range(1000), disable=True):
        pass  # an evaluation has no steps
manual = None
if sys.argv[1] == "nested":
    for epoch in trange(4):
        train(tqdm.tqdm(loader, disable=None))
        if epoch == 1:
            break
elif sys.argv[1] == "inner":
    for epoch in range(2):
        train(tqdm.tqdm(loader))
else:
    manual = tqdm.tqdm(range(12), disable=True)  # as Accelerate's examples have it
    train(loader)
"""


@pytest.mark.parametrize(("kind", "step", "total"), [("nested", 6, 12), ("inner", 6, 6), ("updated", 3, 12)])
def test_steps_to_the_end_are_found_from_bars(
    home: Any, distui: Callable[..., Done], kind: str, step: int, total: int
) -> None:
    home.script("bars.py", BARS)
    done = distui("launch", "--nproc", "1", "--name", kind, "bars.py", kind, DISTUI_TELEMETRY_ENABLED="true")
    assert done.returncode == 0, done.stderr
    status = json.loads(distui("status", str(home.run_named(kind).path), "--json").stdout)
    assert (status["progress"]["step"], status["progress"]["total_steps"]) == (step, total)
