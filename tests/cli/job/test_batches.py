"""What settings make of a script's own batches is told, in one line and among the dashboard's events."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from distui.launcher.report.data import read_report

TRAINING = """
import torch, distui
engine = distui.Engine()
data = torch.utils.data.TensorDataset(torch.ones(32, 2))
model, loader = engine.prepare(torch.nn.Linear(2, 1), torch.utils.data.DataLoader(data, batch_size=16))
print("batches of", len(next(iter(loader))[0]))
"""
Done = subprocess.CompletedProcess[str]


def test_a_batch_that_the_settings_change_is_told_and_one_that_they_do_not_is_not(
    home: Any, distui: Callable[..., Done]
) -> None:
    home.script("cut.py", TRAINING)
    settings = ("--set", "batch.micro_size=8", "--set", "batch.accumulation=1")
    done = distui("launch", "--nproc", "1", *settings, "cut.py", DISTUI_TELEMETRY_ENABLED="true")
    told = (
        "distui: the loader's batches of 16 a rank are 8 by batch.micro_size = 8, batch.accumulation = 1: a step takes "
        "8 x 1 x 1 rank = 8 samples, not 16; unset them to train as the script says"
    )
    assert done.returncode == 0 and "batches of 8" in done.stdout
    assert (done.stdout + done.stderr).count(told) == 1
    events = read_report(home.run_named("cut"), 0.0).events
    assert [f"distui: {event.event.message}" for event in events if event.event.kind == "batch_changed"] == [told]
    home.script("whole.py", TRAINING)
    # The loader's batch as the global one is what one process did.
    done = distui("launch", "--nproc", "2", "--set", "batch.global_size=16", "whole.py")
    assert "batches of 8" in done.stdout and "the loader's" not in done.stdout + done.stderr
