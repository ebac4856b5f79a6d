"""Jobs that something happens to on purpose: gloo ranks forked from one warm process, each job with a situation.

    python benchmarks/faulty_ranks.py

On stdin comes one JSON line a job, {"run": folder, "fault": name}; the fault "end" kills the job, "stop" and "continue"
stop its ranks and let them go on.

Every rank trains (it sleeps, and reduces) until step `FAULT_STEP`; then it happens, and the file `fault` in the
run's folder is written. The ranks end with this process. `tests/faults` and `benchmarks/faults.py` use it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from situations.job import FAULT_STEP, SITUATIONS, Job, Situation

from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry.collectives import install
from distui.core.telemetry.source import open_source

_PR_SET_PDEATHSIG, _CLONE_NEWNET = 1, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_SIGNALS = {"end": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}


def be_rank(run: RunFolder, situation: Situation, rank: int) -> None:
    """Train until it happens, and on."""
    world = situation.world
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    source = open_source(rank, rank, world, run, TelemetrySection(flush_s=0.2))
    install()
    dist.init_process_group("gloo", init_method=f"file://{run.path}/meet", rank=rank, world_size=world)
    source.rank_started("cpu", "cpu", 1)
    job = Job(run, rank, world, source, situation.num_elements)
    try:
        if situation.before is not None:
            situation.before(job)
        while True:
            if job.step == FAULT_STEP:
                dist.barrier()
                if rank == 0:
                    job.told()
                dist.barrier()
                situation.act(job)
            job.train_step()
    except BaseException as error:  # noqa: BLE001  as the launcher's rank does
        status = (error.code or 0) if isinstance(error, SystemExit) else 1
        text = f"{type(error).__name__}: {error}" if status else ""
        print(text, flush=True)
        source.close(int(status), text)
        os._exit(int(status))


def start(run: RunFolder, fault: str) -> int:
    """Fork a job; return the pid of the process above its ranks."""
    situation = SITUATIONS[fault]
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if fault == "slow_link":
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)
    for rank in range(situation.world):
        if not os.fork():
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            be_rank(run, situation, rank)
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
        if (signum := _SIGNALS.get(asked["fault"])) is not None:
            try:
                os.killpg(jobs[asked["run"]], signum)
            except ProcessLookupError:
                continue
        else:
            jobs[asked["run"]] = start(RunFolder(Path(asked["run"])), asked["fault"])
    for pid in jobs.values():
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
