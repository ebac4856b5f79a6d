"""What Slurm has given this process: the nodes of its job, their CPUs, and how often the job was queued again."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distui.core.errors import UserError

_CPUS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """A Slurm job, as one of its processes sees it."""

    job_id: str
    nodes: tuple[str, ...]
    cpus: tuple[int, ...]
    """CPUs of each node that are the job's; empty where Slurm does not say."""
    restarts: int = 0
    """How often the job was queued again."""

    def cpus_of(self, node: str) -> int | None:
        """Return the job's CPUs on one of its nodes."""
        return dict(zip(self.nodes, self.cpus, strict=False)).get(node)


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Return the Slurm job that a process with this environment belongs to; None outside of one.

    Raises: UserError where Slurm's own command cannot say which nodes it has.
    """
    job_id, listed = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_JOB_NODELIST", "")
    if not job_id or not listed:
        return None
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return Allocation(
        job_id,
        tuple(expand(listed)),
        tuple(counts_of(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))),
        int(restarts) if restarts.isdecimal() else 0,
    )


def expand(listed: str) -> list[str]:
    """Return the names that a list such as `gpu[01-03,7]` stands for. Raises: UserError."""
    if not re.search(r"[\[\],]", listed):
        return [listed]
    return ask("scontrol", "show", "hostnames", listed).split()


def counts_of(text: str) -> list[int]:
    """Return `[8, 8, 4]` for Slurm's `8(x2),4`; empty for what is none."""
    found = []
    for word in filter(None, text.split(",")):
        match = _CPUS.fullmatch(word)
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def ask(*words: str) -> str:
    """Return what a command of Slurm prints. Raises: UserError where it fails or is not there."""
    command = " ".join(words)
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except FileNotFoundError as error:
        fix = f"put Slurm's commands on PATH (module load slurm), or install {words[0]}"
        raise UserError(f"Slurm's {words[0]} is not here", f"{command} could not be started", fix) from error
    except subprocess.TimeoutExpired as error:
        fix = "scontrol ping says whether slurmctld is there"
        raise UserError(f"Slurm does not answer within {ANSWER_S:.0f} s", command, fix) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"{command} failed", said, "try it by hand; scontrol ping says whether slurmctld is there")
    return done.stdout


def in_step(environ: Mapping[str, str]) -> bool:
    """Tell whether `srun` has started this process."""
    return environ.get("SLURM_STEP_ID", "").isdecimal()


def tasks_of_step(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return how often `srun` has started this command, over all nodes and at most on one; (1, 1) outside a step."""
    if not in_step(environ):
        return 1, 1
    whole, each = environ.get("SLURM_STEP_NUM_TASKS", "1"), counts_of(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return int(whole) if whole.isdecimal() else 1, max(each, default=1)


def check_tasks(environ: Mapping[str, str], *, starts_nodes: bool, by_hand: bool) -> None:
    """Refuse to be one of several that `srun` has started, each of which would start the whole job.

    `starts_nodes`: this command starts all nodes; `by_hand`: it is one node of several (`--node-rank`).
    Raises: UserError.
    """
    whole, each = tasks_of_step(environ)
    if by_hand and each > 1:
        raise UserError(
            f"srun starts distui launch {each} times on a node",
            "one distui launch starts all ranks of its node",
            "srun --ntasks-per-node=1 distui launch ...",
        )
    if not by_hand and whole > 1:
        fix = "leave srun out: distui launch --slurm SCRIPT, once, starts all nodes by itself"
        if not starts_nodes:
            fix += f"; for {whole} trainings of their own: srun env -u SLURM_STEP_ID distui launch SCRIPT"
        raise UserError(f"srun starts distui launch {whole} times", "each would be a training of its own", fix)


def default_ranks(found: Allocation, environ: Mapping[str, str], num_gpus: int) -> int | None:
    """Return the ranks that `nproc = auto` means on each node of a job; None where Slurm says nothing of it."""
    if num_gpus:
        return num_gpus
    tasks = counts_of(environ.get("SLURM_NTASKS_PER_NODE", ""))
    if tasks:
        return tasks[0]
    return max(1, min(found.cpus) // 2) if found.cpus else None


def as_hosts(found: Allocation, most: int, ranks: int, least: int = 0) -> str:
    """Return the job's nodes as `cluster.hosts` has them, at most so many; 0 is all.

    Raises: UserError where there are fewer, unless they are at least `least`.
    """
    if len(found.nodes) < (least or most):
        most = least or most
        what = f"--nodes {most}, and Slurm job {found.job_id} has {len(found.nodes)}"
        fix = f"sbatch --nodes={most} ..., or --nodes {len(found.nodes)}"
        raise UserError(what, f"its nodes are {', '.join(found.nodes)}", fix)
    taken: Sequence[str] = found.nodes[:most] if most else found.nodes
    return ",".join(f"{node}:{ranks}" for node in taken)
