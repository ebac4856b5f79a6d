"""Jobs that go wrong on purpose: gloo ranks forked from one warm process, each job with a fault of its own.

    python benchmarks/faulty_ranks.py

On stdin comes one JSON line a job, {"run": folder, "fault": name, "world": 3}; the fault "end" kills the job.

Every rank trains (it sleeps, and reduces) until step `FAULT_STEP`; then the fault happens, and the file `fault` in the
run's folder is written. The ranks end with this process. `tests/faults` and `benchmarks/faults.py` use it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from distui.core.collectives import install
from distui.core.config import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry.source import TelemetrySource, open_source

FAULT_STEP = 60
STEP_S = 0.02
SLOW_STEP_S = 0.15
PAUSE_S = 6.0
CULPRIT = 1
OOM_BYTES = 512 << 20
_PR_SET_PDEATHSIG, _CLONE_NEWNET = 1, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Job:
    """What a fault gets: who this is, and what it can break."""

    def __init__(self, run: RunFolder, fault: str, rank: int, world: int, source: TelemetrySource) -> None:
        self.run, self.fault, self.rank, self.world, self.source = run, fault, rank, world, source
        self.is_culprit = rank == CULPRIT
        self.step = 0
        self.step_s = SLOW_STEP_S if fault == "straggler" else STEP_S
        self.loss = 1.0
        self.tensor = torch.ones(1 << (17 if fault == "slow_link" else 10))
        self.first, self.second = dist.new_group(), dist.new_group()
        self.batches: Iterator[Any] = itertools.repeat(None)

    def told(self) -> None:
        """Say when the fault happened."""
        path = self.run.path / "fault"
        path.with_suffix(".new").write_text(str(time.time()))
        path.with_suffix(".new").rename(path)

    def train_step(self) -> None:
        """Do what a training step does, and tell of it."""
        began = time.perf_counter()
        self.source.phase("data")
        next(self.batches)
        data_s = time.perf_counter() - began
        self.source.phase("forward")
        time.sleep(self.step_s)
        forward_s = time.perf_counter() - began - data_s
        self.source.phase("backward")
        dist.all_reduce(self.tensor)
        self.tensor.fill_(1.0)
        step_s = time.perf_counter() - began
        self.step += 1
        fields = {"data_wait_s": data_s, "forward_s": forward_s, "exposed_comm_s": step_s - forward_s - data_s}
        self.source.step(step=self.step, step_s=step_s, loss=self.loss, tokens=64, **fields)
        self.source.phase("idle")


class Stalling(Dataset[int]):
    """Gives a batch a step, and then none for a long time."""

    def __init__(self, stalls: bool) -> None:
        self.stalls = stalls

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        if self.stalls and index >= FAULT_STEP:
            time.sleep(600)
        return index


def asleep(job: Job) -> None:
    if job.is_culprit:
        time.sleep(600)


def stopped(job: Job) -> None:
    if job.is_culprit:
        os.kill(os.getpid(), signal.SIGSTOP)


def holding_the_gil(job: Job) -> None:
    if job.is_culprit:
        os.nice(19)  # it takes a core for as long as it lasts
        re.match(r"(a+)+$", "a" * 60 + "b")  # in C, for years


def killed(job: Job) -> None:
    if job.is_culprit:
        os.kill(os.getpid(), signal.SIGKILL)


def memory_error(job: Job) -> None:
    if job.is_culprit:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 30)


def memory_killed(job: Job) -> None:
    if job.is_culprit:
        group = Path("/sys/fs/cgroup/memory") / f"distui-{os.getpid()}"
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(OOM_BYTES))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        torch.ones(OOM_BYTES)  # four times as many bytes


def operation(job: Job) -> None:
    if job.is_culprit:
        dist.broadcast(job.tensor, 0)
    else:
        dist.all_reduce(job.tensor)


def size(job: Job) -> None:
    dist.all_reduce(torch.ones(1 << (12 if job.is_culprit else 10)))


def order(job: Job) -> None:
    groups = [job.first, job.second]
    for group in reversed(groups) if job.is_culprit else groups:
        dist.all_reduce(job.tensor, group=group)


def straggler(job: Job) -> None:
    if job.is_culprit:
        job.step_s *= 1.15


def slow_link(job: Job) -> None:
    if job.is_culprit:
        shape = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "80mbit", "burst", "64kb", "latency", "1s"]
        subprocess.run(shape, check=True)


def data_stall(job: Job) -> None:
    """Nothing here: the loader stalls by itself."""


def nan_loss(job: Job) -> None:
    if job.is_culprit:
        job.loss = math.nan


def disk_full(job: Job) -> None:
    if job.is_culprit:
        try:
            (job.run.path / "filler").write_bytes(bytes(64 << 20))
        except OSError:
            pass  # what this is about


def pauses(job: Job) -> None:
    """No fault: rank 0 evaluates alone, with and without saying so, and then all save for long."""
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


FAULTS: dict[str, Callable[[Job], None]] = {
    "asleep": asleep,
    "stopped": stopped,
    "holding_the_gil": holding_the_gil,
    "killed": killed,
    "memory_error": memory_error,
    "memory_killed": memory_killed,
    "operation": operation,
    "size": size,
    "order": order,
    "straggler": straggler,
    "slow_link": slow_link,
    "data_stall": data_stall,
    "nan_loss": nan_loss,
    "disk_full": disk_full,
    "pauses": pauses,
    "none": data_stall,
}


def be_rank(run: RunFolder, fault: str, rank: int, world: int) -> None:
    """Train until the fault, and on."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    source = open_source(rank, rank, world, run, TelemetrySection(flush_s=0.2))
    install()
    dist.init_process_group("gloo", init_method=f"file://{run.path}/meet", rank=rank, world_size=world)
    source.rank_started("cpu", "cpu", 1)
    job = Job(run, fault, rank, world, source)
    if fault == "data_stall":
        job.batches = iter(DataLoader(Stalling(job.is_culprit), num_workers=1, prefetch_factor=2, batch_size=None))
    try:
        while True:
            if job.step == FAULT_STEP:
                dist.barrier()
                if rank == 0:
                    job.told()
                dist.barrier()
                FAULTS[fault](job)
            job.train_step()
    except BaseException as error:  # noqa: BLE001  as the launcher's rank does
        print(f"{type(error).__name__}: {error}", flush=True)
        source.close(1, f"{type(error).__name__}: {error}")
        os._exit(1)


def start(run: RunFolder, fault: str, world: int) -> int:
    """Fork a job; return the pid of the process above its ranks."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if fault == "slow_link":
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)
    for rank in range(world):
        if not os.fork():
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            be_rank(run, fault, rank, world)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


def main() -> None:
    """Start the jobs that are asked for, until stdin is closed."""
    jobs: dict[str, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["fault"] == "end":
            os.killpg(jobs.pop(asked["run"]), signal.SIGKILL)
        else:
            jobs[asked["run"]] = start(RunFolder(Path(asked["run"])), asked["fault"], asked["world"])
    for pid in jobs.values():
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
