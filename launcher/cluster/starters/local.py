"""Several hosts that are all this machine: to try a job on many of them where there is one."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import Sequence

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem
from distui.launcher.cluster.hosts import Host


class LocalStarter:
    """Starts commands as processes of this machine, whatever the hosts are called."""

    one_machine = True

    def __init__(self, cluster: ClusterSection) -> None:
        pass

    async def address(self, host: Host) -> str:
        """Return loopback."""
        return "127.0.0.1"

    async def start(self, host: Host, command: Sequence[str]) -> asyncio.subprocess.Process:
        """Start `command` here."""
        return await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return its last words."""
        last = next((line for line in reversed(said.splitlines()) if line.strip()), f"exit status {status}")
        return Problem(host.name, f"the agent could not start (exit status {status})", last, "see launcher.log")
