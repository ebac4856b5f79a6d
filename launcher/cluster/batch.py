"""Slurm batch jobs: the script that `distui launch --slurm` submits, and the job's way back into the queue."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distui.core.config.schema import Config
from distui.core.errors import EXIT_PREEMPTED, UserError
from distui.launcher.cluster.allocation import Allocation, ask
from distui.launcher.job.outcome import HOST_LOST, Outcome
from distui.launcher.job.processes import own_command

SET_BY_US = ("cluster.slurm_partition", "cluster.slurm_time", "cluster.slurm_args")
"""Settings of the submission, which the job itself has no use for."""
_STATE = re.compile(r"\b(JobState|Reason|BatchFlag|Requeue|Restarts)=(\S+)")


@dataclass(frozen=True, slots=True)
class Submission:
    """What `distui launch --slurm` was asked for, as it is typed again inside the job."""

    name: str
    target: Sequence[str]
    options: Sequence[str]
    """Of `distui launch`, but for settings: `--as`, `--config`, ..."""
    overrides: Mapping[str, str]
    origins: Mapping[str, str]
    """Where each setting comes from; what nobody has set is chosen for a job that may be ended and queued again."""
    folder: Path


def batch_script(asked: Submission, config: Config) -> str:
    """Return the script: options of sbatch, and one command. Raises: UserError for `slurm_args` that cannot be cut."""
    cluster = config.cluster
    options = [f"--job-name={asked.name}", f"--nodes={_nodes(config)}", "--ntasks-per-node=1"]
    if cluster.slurm_partition:
        options.append(f"--partition={cluster.slurm_partition}")
    if cluster.slurm_time:
        options.append(f"--time={cluster.slurm_time}")
    options.append(f"--signal=B:USR1@{cluster.slurm_signal_s}")
    options += ["--requeue" if cluster.slurm_requeue else "--no-requeue", "--open-mode=append"]
    if cluster.min_nodes and cluster.min_nodes < cluster.nodes:
        options.append("--no-kill")  # the job goes on with the nodes that are left
    try:
        more = shlex.split(cluster.slurm_args)
    except ValueError as error:
        why = f"{cluster.slurm_args!r}: {error}"
        raise UserError("cluster.slurm_args cannot be cut into options", why, "close its quotes") from error
    lines = [f"#SBATCH {shlex.quote(word)}" for word in options]
    if more:
        lines.append(f"#SBATCH {shlex.join(more)}")  # last: what is said there counts
    command = [*own_command("distui"), "launch", "--slurm", *asked.options]
    for key, value in asked.overrides.items():
        if key not in SET_BY_US and key != "cluster.starter":
            command += ["--set", f"{key}={value}"]
    for key, value in (("cluster.on_preempt", "save"), ("checkpoint.resume", "always")):
        if asked.origins[key] == "default":
            command += ["--set", f"{key}={value}"]
    words = shlex.join(command)
    if not config.checkpoint.dir:
        words += f' --set {shlex.quote(f"checkpoint.dir={asked.folder}/checkpoints/slurm-")}"$SLURM_JOB_ID"'
    target = shlex.join(["-m", *asked.target[1:]] if asked.target[0] == "-m" else asked.target)
    body = [f"cd {shlex.quote(str(asked.folder))} || exit 2", f"exec {words} {target}"]
    return "\n".join(["#!/bin/bash", *lines, *body, ""])


def _nodes(config: Config) -> str:
    cluster = config.cluster
    least = cluster.min_nodes
    return f"{least}-{cluster.nodes}" if least and least < cluster.nodes else str(cluster.nodes)


def submit(script: str, folder: Path) -> str:
    """Have sbatch take the script; return the job's id. Raises: UserError with sbatch's words."""
    fix = "sinfo shows partitions, limits and nodes; --slurm --dry-run prints what is submitted"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        fix = "run this on a login node of the cluster (module load slurm), or print the script: --slurm --dry-run"
        raise UserError("Slurm's sbatch is not here", "no command of this name is on PATH", fix) from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError("sbatch did not take the job", "; ".join(line.strip() for line in said[:3]), fix)
    return done.stdout.strip().partition(";")[0]


def queue_again(job: Allocation, config: Config, outcome: Outcome) -> str:
    """Put a batch job that gave way, or that lost a host, into the queue again; return what is to be said of it.

    Not where it was cancelled, nor where Slurm does so itself. "" where the outcome asks for nothing.
    """
    gave_way = outcome.exit_status == EXIT_PREEMPTED
    lost = any(rank.error == HOST_LOST for rank in outcome.ranks)
    if not gave_way and not (outcome.state == "failed" and lost and job.restarts < config.cluster.max_restarts):
        return ""
    name = f"Slurm job {job.job_id}"
    if not config.cluster.slurm_requeue:
        return f"{name} is not queued again: cluster.slurm_requeue is false"
    try:
        found = dict(_STATE.findall(ask("scontrol", "-o", "show", "job", job.job_id)))
        if found.get("BatchFlag") != "1":
            return ""  # salloc's: whoever holds it starts again by hand
        if found.get("Requeue") != "1":
            return f"{name} is not queued again: it was submitted with --no-requeue, or the cluster forbids it"
        if int(found["Restarts"]) > job.restarts:
            return f"{name} is queued again by Slurm, and will go on from its last checkpoint"
        if found["JobState"] != "RUNNING" and found.get("Reason") != "TimeLimit":
            return f"{name} is {found['JobState'].lower()}, by whoever ended it: it is not queued again from here"
        ask("scontrol", "requeue", job.job_id)
    except (UserError, KeyError, ValueError) as error:
        return f"{name} could not be queued again: {error}"
    return f"{name} is queued again, and will go on from its last checkpoint"
