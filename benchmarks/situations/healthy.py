"""Jobs that are well and look sick: nothing must be said of them."""

from __future__ import annotations

import ctypes
import math
import os
import random
import subprocess
import time

import numpy as np
import torch
import torch.distributed as dist

from situations.job import Job, at_work, healthy

PAUSE_S = 6.0
_PR_SET_PTRACER, _PTRACE_ATTACH = 0x59616D61, 16


@healthy(for_s=30.0)
def pauses(job: Job) -> None:
    """Rank 0 evaluates alone, with and without saying so, and then all save for long."""
    if job.rank == 0:
        job.source.phase("evaluation")
        time.sleep(PAUSE_S)
        job.source.phase("idle")
    dist.barrier()
    if job.rank == 0:  # a plain script's: nothing says what it is, but it moves
        until = time.monotonic() + PAUSE_S
        while time.monotonic() < until:
            time.sleep(0.3)
            time.sleep(0.3)
            time.sleep(0.3)
    dist.barrier()
    job.source.phase("checkpoint")
    if job.rank == 0:
        time.sleep(PAUSE_S)
    dist.barrier()


@healthy(for_s=25.0)
def long_evaluation_of_all(job: Job) -> None:
    job.source.phase("evaluation")
    time.sleep(18.0)
    job.source.phase("idle")


@healthy(for_s=25.0)
def work_of_one(job: Job) -> None:
    if job.rank == 0:
        at_work(15.0)


@healthy(for_s=25.0)
def child_process_of_one(job: Job) -> None:
    if job.rank == 0:
        subprocess.run(["sleep", "15"], check=True)


@healthy(for_s=25.0)
def export_of_one(job: Job) -> None:
    if job.rank == 0:
        until, path = time.monotonic() + 12.0, job.run.path / "export"
        while time.monotonic() < until:
            path.write_bytes(bytes(8 << 20))
            time.sleep(0.02)
        path.unlink()


@healthy(for_s=25.0)
def long_product_of_one(job: Job) -> None:
    if job.rank == 0:
        until, matrix = time.monotonic() + 12.0, torch.ones(700, 700)
        while time.monotonic() < until:
            torch.linalg.svd(matrix)


@healthy(for_s=30.0)
def sleep_before_a_barrier(job: Job) -> None:
    if job.rank == 0:
        time.sleep(20.0)
    dist.barrier()


def _late(job: Job) -> None:
    if job.is_culprit:
        time.sleep(12.0)


@healthy(for_s=10.0, before=_late)
def late_start_of_one(job: Job) -> None:
    """Nothing here: it was late before the first step."""


@healthy(for_s=10.0, before=lambda job: at_work(10.0))
def long_first_step(job: Job) -> None:
    """Nothing here: all compiled before the first step."""


@healthy(for_s=25.0)
def slow_steps(job: Job) -> None:
    job.step_s = 2.5


@healthy(for_s=70.0)
def very_slow_steps(job: Job) -> None:
    for _ in range(2):  # so that the usual step is a long one before it takes 30 s
        job.step_s = 4.0
        job.train_step()
    job.step_s = 15.0
    job.train_step()
    job.step_s = 30.0


@healthy(for_s=20.0)
def many_collectives_a_step(job: Job) -> None:
    job.num_reduces = 20


@healthy(for_s=20.0, num_elements=2)
def tiny_collectives(job: Job) -> None:
    job.num_reduces = 5


@healthy(for_s=25.0)
def bursts(job: Job) -> None:
    job.forward = lambda: time.sleep(0.4 if job.step % 20 < 4 else 0.01)


@healthy(for_s=25.0)
def noisy_steps(job: Job) -> None:
    draws = random.Random(job.rank)
    job.forward = lambda: time.sleep(draws.uniform(0.01, 0.05))


@healthy(for_s=25.0)
def each_slow_in_turn(job: Job) -> None:
    job.forward = lambda: time.sleep(0.06 if job.step % job.world == job.rank else 0.03)


@healthy(for_s=20.0)
def some_data_to_wait_for(job: Job) -> None:
    job.data_s = 0.003


@healthy(for_s=20.0)
def skipped_steps(job: Job) -> None:
    job.skipped = True
    job.loss = lambda step: math.nan


@healthy(for_s=20.0)
def noisy_losses(job: Job) -> None:
    draws = random.Random(1)
    job.loss = lambda step: 1.0 + abs(draws.gauss(0, 0.3))


def _anneals(job: Job) -> None:
    """The cosine begins again each 200 steps; the loss doubles then, and comes back."""
    draws = random.Random(1)
    job.learning_rate = lambda step: 1e-3 * (1 + math.cos(math.pi * ((step - 1) % 200) / 200)) / 2

    def loss(step: int) -> float:
        falls = 0.8 + 4.0 * math.exp(-step / 30) if step <= 200 else 0.8 + 1200 * (job.learning_rate(step) or 0.0)
        return falls + draws.gauss(0, 0.02)

    job.loss = loss


@healthy(for_s=25.0, before=_anneals)
def warm_restart(job: Job) -> None:
    """Nothing here: its schedule is so from the first step on."""


@healthy(for_s=45.0)
def memory_that_comes_and_goes(job: Job) -> None:
    def forward() -> None:
        job.kept.append(np.ones(60_000))
        if len(job.kept) > 200:
            job.kept.clear()
        time.sleep(0.02)

    job.forward = forward


@healthy(for_s=60.0)
def maps_a_dataset(job: Job) -> None:
    """As a file of tokens is read: each page stays in memory until somebody needs the room."""
    tokens = np.memmap(job.run.path / f"tokens{job.rank}", np.uint8, "w+", shape=4 << 30)

    def forward() -> None:
        at = (job.step * 500_000) % len(tokens)
        tokens[at : at + 500_000].sum()
        time.sleep(0.02)

    job.forward = forward


@healthy(for_s=15.0)
def held_by_a_debugger(job: Job) -> None:
    """As gdb holds it: a child attaches to the culprit, and sees it stop."""
    if job.is_culprit:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PTRACER, -1)
        if not os.fork():
            libc.ptrace(_PTRACE_ATTACH, os.getppid(), 0, 0)
            time.sleep(60)
            os._exit(0)
        time.sleep(1.0)


@healthy(for_s=25.0)
def suspended(job: Job) -> None:
    """Nothing here: the bench stops the ranks and the daemon for a while, as closing a laptop does."""


@healthy(for_s=12.0)
def ends_one_after_the_other(job: Job) -> None:
    dist.barrier()
    time.sleep(3.0 * job.rank)
    raise SystemExit(0)
