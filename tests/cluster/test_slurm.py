"""Jobs in a real Slurm of three hosts: submitted, started by srun, asked for their place, queued again.

Needs root, sshd, slurm-wlm and munge: `make test-cluster`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY, STEPS_SCRIPT
from tests.cluster.slurm import SlurmCluster, missing

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm can be run")]
LIMIT_S = 150.0
SAVES = "--set cluster.on_preempt=save --set checkpoint.resume=always --set checkpoint.dir=ck-$SLURM_JOB_ID"


class Queue:
    """The cluster, and what is submitted to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = SlurmCluster(folder, 3)
        self.cluster.environ |= {"DISTUI_STATE_DIR": f"{folder}/state/s", "DISTUI_RUNTIME_DIR": f"{folder}/state/rt"}
        self.cluster.environ |= {"DISTUI_NO_TUI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        (folder / "steps.py").write_text(STEPS_SCRIPT)
        self.launch = f"{sys.executable} -m distui launch"

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script of one line, and return the job's id."""
        path = self.folder / "own.sh"
        path.write_text(f"#!/bin/bash\n{script}\necho ended $?\n")
        words = ("--requeue", "--open-mode=append", f"--output={self.folder}/slurm-%j.out", *options)
        return self.cluster.slurm("sbatch", "--parsable", *words, str(path)).strip()

    def said(self, job: str) -> str:
        """Return what a job has printed."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        """Return a job's state as scontrol has it."""
        found = re.search(r"JobState=(\S+)", self.cluster.slurm("scontrol", "show", "job", job))
        return found[1] if found else ""

    def until(self, is_so: Callable[[], object], what: str, job: str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            assert time.monotonic() < deadline, self.why(what, job)
            time.sleep(0.1)

    def why(self, what: str, job: str) -> str:
        """Return what is known of a job that did not do what was waited for."""
        log = [line for line in (self.folder / "slurmctld.log").read_text().splitlines() if f"JobId={job} " in line]
        return "\n".join([what, self.said(job), self.cluster.slurm("scontrol", "show", "job", job), *log[-20:]])

    def steps(self, out: str, rank: int = 0) -> list[dict[str, Any]]:
        """Return what the script wrote, a step each."""
        path = self.folder / f"{out}-{rank}.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def until_trains(self, out: str, job: str, after: int = 0) -> None:
        """Wait until some steps have been done."""
        self.until(lambda: len(self.steps(out)) > after + 3, "no step was done", job)

    def goes_on(self, out: str, job: str) -> None:
        """Wait until a job that was queued again has ended: no step is missing, none was done twice."""
        self.until(lambda: self.state(job) == "PENDING", "it was not queued again", job)
        before = len(self.steps(out))
        self.cluster.slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")  # of itself it waits two minutes
        self.until(
            lambda: len(self.steps(out)) > before or self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"),
            "it did not go on",
            job,
        )
        assert len(self.steps(out)) > before, self.why("it ended", job)
        steps = self.steps(out)
        assert [one["step"] for one in steps] == list(range(1, len(steps) + 1)), self.said(job)
        assert all(one["lr"] == pytest.approx(0.05 / one["step"]) for one in steps)
        self.until(lambda: "going on from " in self.said(job), "it does not say from where", job)


@pytest.fixture(scope="module")
def made() -> Iterator[Queue]:
    with tempfile.TemporaryDirectory(prefix="dts", dir="/tmp") as name:
        os.chmod(name, 0o755)
        found = Queue(Path(name))
        try:
            yield found
        finally:
            found.cluster.slurm("scancel", "--user=root")
            found.cluster.stop()


@pytest.fixture
def queue(made: Queue) -> Iterator[Queue]:
    yield made
    made.cluster.slurm("scancel", "--user=root")
    deadline = time.monotonic() + LIMIT_S
    while made.cluster.slurm("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.1)


def options(out: str, **more: object) -> str:
    return json.dumps({"out": out, "epochs": 100000, "pause_s": 0.05} | more)


def test_one_command_submits_and_scontrol_requeue_costs_no_step(queue: Queue) -> None:
    words = ["launch", "--slurm", "--nodes", "2", "--nproc", "1", "--slurm-time", "30", "steps.py", options("sent")]
    job = queue.cluster.slurm(sys.executable, "-m", "distui", *words).partition("\n")[0]
    assert job.isdecimal(), job
    queue.until_trains("sent", job)
    assert "2 ranks on 2 nodes" in queue.said(job)
    ranks = [host for host in queue.cluster.hosts if host.pids("launcher.node.rank")]
    assert len(ranks) == 2, "one rank on each of the nodes"
    queue.cluster.slurm("scontrol", "requeue", job)
    queue.goes_on("sent", job)
    assert f"Slurm job {job} is queued again by Slurm" in queue.said(job)


ASKED: dict[str, tuple[str, ...]] = {
    "USR1 to the steps": ("scancel", "-s", "USR1"),
    "USR1 to the batch script's processes": ("scancel", "-s", "USR1", "--full"),
}


@pytest.mark.parametrize("how", ASKED)
def test_who_is_asked_for_its_place_saves_and_is_queued_again(how: str, queue: Queue) -> None:
    out = f"asked{list(ASKED).index(how)}"
    # `exec`: a shell in between would die of the signal.
    job = queue.submit(f"exec {queue.launch} --slurm --nproc 1 {SAVES} steps.py '{options(out)}'", "--nodes=2")
    queue.until_trains(out, job)
    queue.cluster.slurm(*ASKED[how], job)
    queue.goes_on(out, job)
    assert f"Slurm job {job} is queued again, and will go on" in queue.said(job)


def test_a_time_limit_saves_and_queues_again(queue: Queue) -> None:
    job = queue.submit(
        f"exec {queue.launch} --slurm --nproc 1 {SAVES} steps.py '{options('limit')}'", "--nodes=1", "-t1"
    )
    queue.until_trains("limit", job)
    queue.goes_on("limit", job)
    assert "DUE TO TIME LIMIT" in queue.said(job)


def test_who_is_cancelled_saves_and_is_not_queued_again(queue: Queue) -> None:
    job = queue.submit(f"exec {queue.launch} --slurm --nproc 1 {SAVES} steps.py '{options('off')}'", "--nodes=2")
    queue.until_trains("off", job)
    queue.cluster.slurm("scancel", job)
    queue.until(lambda: "not queued again from here" in queue.said(job), "it was not told", job)
    queue.until(lambda: queue.state(job) == "CANCELLED", "it is not cancelled", job)
    saved = [path.name for path in (queue.folder / f"ck-{job}").glob("step_*")]
    assert saved == [f"step_{len(queue.steps('off')):08d}"]


def test_a_killed_rank_and_a_killed_agent_are_started_again_within_the_job(queue: Queue) -> None:
    words = f"--slurm --nproc 1 --max-restarts 2 --set checkpoint.every_steps=5 --set checkpoint.dir={queue.folder}/ck"
    job = queue.submit(f"{queue.launch} {words} steps.py '{options('again', epochs=30)}'", "--nodes=2")
    queue.until_trains("again", job)
    ran = [host for host in queue.cluster.hosts if host.pids("launcher.node.rank")]
    ran[1].kill(ran[1].pids("launcher.node.rank")[0])
    queue.until(lambda: any(one["attempt"] == 1 for one in queue.steps("again")), "no second attempt", job)
    ran[1].kill(ran[1].pids("launcher.node.member")[0])
    queue.until(lambda: queue.state(job) not in ("RUNNING", "PENDING"), "it did not end", job)
    said = queue.said(job)
    assert queue.state(job) == "COMPLETED" and "ended 0" in said, said
    assert "rank 1: killed by SIGKILL; restart 1 of 2" in said
    assert re.search(rf"{ran[1].name} \(node 1, rank 1\): its agent.*; restart 2 of 2", said), said
    assert {one["attempt"] for one in queue.steps("again")} == {0, 1, 2}
    left = [host.name for host in queue.cluster.hosts if host.pids("launcher.node")]
    assert not left


def test_an_allocation_is_found_and_two_tasks_a_node_are_refused(queue: Queue) -> None:
    launch = [sys.executable, "-m", "distui", "launch", "--nproc", "1"]
    done = queue.cluster.slurm("salloc", "--nodes=2", *launch, "steps.py", options("found", epochs=2))
    assert "2 ranks on 2 nodes" in done and "finished after" in done, done
    assert len(queue.steps("found", 1)) == 12
    done = queue.cluster.slurm("srun", "--nodes=1", "--ntasks=2", *launch, "--slurm", "steps.py", options("twice"))
    assert "srun starts distui launch 2 times" in done and not queue.steps("twice"), done
    done = queue.cluster.slurm("salloc", "--nodes=1", *launch, "--slurm", "--nodes", "2", "steps.py", options("few"))
    assert "--nodes 2, and Slurm job" in done and "sbatch --nodes=2" in done, done
