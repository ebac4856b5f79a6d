"""Ranks that end: killed, of memory, of an exception, of their loader's worker."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from situations.job import FAULT_STEP, Job, sick

OOM_BYTES = 512 << 20


@sick("dead_rank", 1, within_s=1.0)
def killed(job: Job) -> None:
    if job.is_culprit:
        os.kill(os.getpid(), signal.SIGKILL)


@sick("dead_rank", 0, within_s=1.0)
def first_killed(job: Job) -> None:
    if job.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


@sick("dead_rank", 1, within_s=1.0)
def terminated(job: Job) -> None:
    if job.is_culprit:
        os.kill(os.getpid(), signal.SIGTERM)


@sick("dead_rank", 1, within_s=2.0)
def segfault(job: Job) -> None:
    if job.is_culprit:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)


@sick("dead_rank", 1, within_s=2.0)
def aborts(job: Job) -> None:
    if job.is_culprit:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()


@sick("dead_rank", 1, within_s=1.0)
def exits_hard(job: Job) -> None:
    if job.is_culprit:
        os._exit(7)


@sick("dead_rank", 1, within_s=1.0)
def exits_with_1(job: Job) -> None:
    if job.is_culprit:
        sys.exit(1)


@sick("dead_rank", 1, within_s=1.0)
def raises(job: Job) -> None:
    if job.is_culprit:
        raise ValueError("a batch of another shape")


@sick("out_of_memory", 1, within_s=1.0)
def memory_error(job: Job) -> None:
    if job.is_culprit:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 30)


@sick("out_of_memory", 1, within_s=1.0, needs_root=True)
def memory_killed(job: Job) -> None:
    if job.is_culprit:
        group = Path("/sys/fs/cgroup/memory") / f"distui-{os.getpid()}"
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(OOM_BYTES))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        torch.ones(OOM_BYTES)  # four times as many bytes


class _Ending(Dataset[int]):
    """Its worker ends, by a signal or an exception, at one step."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        if index == FAULT_STEP + 10 and self.how == "killed":  # it is some batches ahead
            os.kill(os.getpid(), signal.SIGKILL)
        if index == FAULT_STEP and self.how == "raises":
            raise KeyError("a label that there is not")
        return index


def _loader(job: Job, how: str) -> None:
    job.batches = iter(
        DataLoader(_Ending(how if job.is_culprit else ""), num_workers=1, prefetch_factor=2, batch_size=None)
    )


@sick("dead_rank", 1, before=lambda job: _loader(job, "killed"))
def worker_killed(job: Job) -> None:
    """Nothing here: the loader's worker ends by itself."""


@sick("dead_rank", 1, before=lambda job: _loader(job, "raises"))
def worker_raises(job: Job) -> None:
    """Nothing here: the loader's worker raises by itself."""
