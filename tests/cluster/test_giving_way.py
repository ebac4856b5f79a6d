"""A job that is asked for its place: it saves at a step that all ranks agree on, and the next launch goes on there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from distui.core.errors import EXIT_PREEMPTED
from distui.launcher.job.outcome import read_outcome
from tests.cluster.conftest import LIMIT_S, Place

KEPT = ("--set", "checkpoint.dir=ck", "--set", "checkpoint.resume=always", "--set", "cluster.on_preempt=save")


def test_it_saves_ends_with_75_and_the_next_launch_goes_on(place: Place) -> None:
    steps = place.path / "long-0.jsonl"
    os.mkfifo(steps)  # whoever reads it hears of each step, and of the end
    options = {"out": "long", "epochs": 10**6, "pause_s": 0.02}
    job = subprocess.Popen(
        [sys.executable, "-m", "distui", "launch", "--nproc", "2", *KEPT, "steps.py", json.dumps(options)],
        cwd=place.path,
        env=place.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with steps.open() as told:
        for _ in range(3):
            told.readline()
        job.send_signal(signal.SIGUSR1)
        last = json.loads([line for line in told if line.strip()][-1])
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == EXIT_PREEMPTED, err
    (run,) = place.runs()
    outcome = read_outcome(run)
    assert outcome is not None and outcome.state == "stopped" and "gave way" in outcome.message
    # The schedule, the data and the steps go on as if nothing had been; the new script says where it ends.
    num_epochs = last["epoch"] + 2
    options = {"out": "again", "epochs": num_epochs}
    done = place.distui("launch", "--nproc", "2", *KEPT, "steps.py", json.dumps(options))
    assert done.returncode == 0, done.stderr
    again = place.steps("again", 0)
    first = again[0]
    assert first["step"] == last["step"] + 1 and first["lr"] == pytest.approx(0.05 / first["step"])
    assert again[-1]["step"] == 6 * num_epochs
    # One story: what the first run and the time between them cost is in the second one's account.
    before, after = (json.loads(place.distui("status", name.run_id, "--json").stdout) for name in place.runs())
    assert (before["restarts"], after["restarts"]) == (0, 1)
    parts = [f"{name}_s" for name in ("start", "notice", "waiting", "restart")]
    assert after["effort"]["start_s"] == before["effort"]["start_s"] > 0
    assert all(after["effort"][part] > 0 for part in parts), after["effort"]
    assert after["effort"]["wall_s"] > before["effort"]["wall_s"] + after["effort"]["waiting_s"]
    assert after["effort"]["notice_s"] == before["effort"]["notice_s"] > 0, "saving, and ending"
    assert "started again 1 time; " in place.distui("status", after["run"]).stdout
