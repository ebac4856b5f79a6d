"""Nodes of a Slurm job, each agent by an `srun` of its own that shares the node with whatever else the job runs."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem, UserError
from distui.launcher.cluster.allocation import allocation
from distui.launcher.cluster.hosts import Host

_CAUSES = (
    (r"not in this job|[Nn]ode.*not.*allocat|Requested node configuration", "the job does not have this node",
     "scontrol show hostnames names the job's nodes"),
    (r"nvalid job id|[Jj]ob.*(completing|completed)|revoked", "the Slurm job is over", "submit it again"),
    (r"are busy|temporarily unavailable", "another step has taken it", "start other steps with srun --overlap"),
    (r"No module named '?distui", "distui is not installed for that Python", "install distui there, at the same path"),
    (r"[Nn]o such file|not found", "there is no such Python", "install Python and distui there, at the same path"),
)  # fmt: skip
_NOT_OURS = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK")
"""How many tasks the user's own `srun` would start, and with what: this one starts one agent, with all of the node."""


class SlurmStarter:
    """Starts commands by `srun` inside the Slurm job that this process belongs to."""

    one_machine = False
    way = "srun"

    def __init__(self, cluster: ClusterSection) -> None:
        found = allocation(os.environ)
        if found is None:
            raise UserError(
                "cluster.starter is slurm, and this is no Slurm job",
                "SLURM_JOB_ID is not set: agents are started by srun, inside an allocation",
                "distui launch --slurm SCRIPT submits one; or begin it with salloc or sbatch",
            )
        self._job = found
        self._addresses: dict[str, str] | None = None

    async def address(self, host: Host) -> str:
        """Return the address that Slurm has for the node (NodeAddr), else its name."""
        if self._addresses is None:
            names = ",".join(self._job.nodes)
            told = b""
            try:
                asked = await asyncio.create_subprocess_exec(
                    "scontrol", "-o", "show", "node", names, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
                )
                told, _ = await asked.communicate()
            except OSError as error:
                print(f"scontrol cannot be asked for nodes' addresses: {error}", flush=True)
            pairs = re.findall(r"NodeName=(\S+).*?NodeAddr=(\S+)", told.decode(errors="replace"))
            self._addresses = dict(pairs)
        return self._addresses.get(host.name, host.name)

    async def start(self, host: Host, command: Sequence[str]) -> asyncio.subprocess.Process:
        """Start `command` there, as one task with all of the job's CPUs, memory and GPUs of that node."""
        words = ["srun", f"--jobid={self._job.job_id}", f"--nodelist={host.name}", "--nodes=1", "--ntasks=1"]
        words += [
            "--ntasks-per-node=1",
            "--overlap",
            "--mem=0",
            "--cpu-bind=none",
            "--unbuffered",
            "--kill-on-bad-exit=0",
        ]
        if cpus := self._job.cpus_of(host.name):
            words.append(f"--cpus-per-task={cpus}")
        line = f"echo distui: ssh; exec {shlex.join(command)}"
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
        return await asyncio.create_subprocess_exec(
            *words, "sh", "-c", line, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environ, start_new_session=True
        )

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return what srun's words come to."""
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), f"exit status {status}")
        for pattern, why, fix in _CAUSES:
            if re.search(pattern, said):
                return Problem(host.name, f"it cannot be used: {last}", why, fix)
        fix = f"try it by hand: srun --overlap --nodes=1 --ntasks=1 --nodelist={host.name} hostname"
        return Problem(host.name, f"srun could not start the agent (exit status {status})", last, fix)
