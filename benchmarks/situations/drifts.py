"""Jobs that go on, and not as they should: slow ranks, links and data, losses, memory, disks, processors."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from situations.job import Job, sick

SLOW_STEP_S = 0.15


def _slowly(job: Job) -> None:
    job.step_s = SLOW_STEP_S


@sick("straggler", 1, within_s=20.0, before=_slowly)
def straggler(job: Job) -> None:
    if job.is_culprit:
        job.step_s *= 1.15


@sick("straggler", 1, within_s=20.0, before=_slowly)
def straggler_in_data(job: Job) -> None:
    if job.is_culprit:
        job.data_s = 0.05


@sick("straggler", 2, 3, within_s=20.0, world=4, before=_slowly)
def two_stragglers(job: Job) -> None:
    if job.rank > 1:
        job.step_s *= 1.4


@sick("straggler", 1, within_s=25.0)
def straggler_at_times(job: Job) -> None:
    def forward() -> None:
        time.sleep(0.5 if job.is_culprit and job.step % 10 == 0 else 0.03)

    job.forward = forward


@sick("straggler", 1, within_s=60.0)
def straggler_in_long_steps(job: Job) -> None:
    job.step_s = 3.0 if job.is_culprit else 2.0


@sick("slow_link", 0, 1, 2, within_s=20.0, needs_root=True, num_elements=1 << 17)
def slow_link(job: Job) -> None:
    if job.is_culprit:
        shape = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "80mbit", "burst", "64kb", "latency", "1s"]
        subprocess.run(shape, check=True)


@sick("nan_loss", 1, within_s=2.0)
def nan_loss(job: Job) -> None:
    if job.is_culprit:
        job.loss = lambda step: math.nan


@sick("nan_loss", 0, 1, 2, within_s=2.0)
def nan_everywhere(job: Job) -> None:
    job.loss = lambda step: math.nan


@sick("nan_loss", 1, within_s=2.0)
def nan_that_spreads(job: Job) -> None:
    first = job.step + (1 if job.is_culprit else 2)
    job.loss = lambda step: math.nan if step >= first else 1.0


@sick("nan_loss", 2, within_s=2.0)
def infinite_loss(job: Job) -> None:
    if job.rank == 2:
        job.loss = lambda step: math.inf


@sick("loss_spike", 0, 1, 2, within_s=4.0)
def loss_jumps(job: Job) -> None:
    job.loss = lambda step: 7.0


@sick("loss_spike", 1, within_s=4.0)
def loss_of_one_jumps(job: Job) -> None:
    if job.is_culprit:
        job.loss = lambda step: 7.0


@sick("loss_spike", 0, 1, 2, within_s=4.0)
def loss_jumps_as_the_rate_falls(job: Job) -> None:
    began = job.step
    job.learning_rate = lambda step: 1e-3 / (step - began + 1)
    job.loss = lambda step: 1.0 if step < began + 50 else 7.0


@sick("data_bound", 0, 1, 2, within_s=20.0)
def all_wait_for_data(job: Job) -> None:
    job.data_s = 0.06


@sick("memory_growth", 1, within_s=75.0)
def leaks(job: Job) -> None:
    if job.is_culprit:
        forward = job.forward

        def leaking() -> None:
            job.kept.append(np.ones(60_000))  # 480 kB a step
            forward()

        job.forward = leaking


@sick("cpu_throttled", 0, 1, 2, within_s=25.0, needs_root=True)
def throttled(job: Job) -> None:
    group = Path("/sys/fs/cgroup/cpu") / f"distui-{job.run.run_id}"
    group.mkdir(exist_ok=True)
    (group / "cpu.cfs_period_us").write_text("20000")
    (group / "cpu.cfs_quota_us").write_text("6000")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    job.forward = lambda: [sum(range(2000)) for _ in range(60)] and None


@sick("disk_full", within_s=2.0, needs_root=True)
def disk_full(job: Job) -> None:
    if job.is_culprit:
        with contextlib.suppress(OSError):  # which is what this is about
            (job.run.path / "filler").write_bytes(bytes(64 << 20))
