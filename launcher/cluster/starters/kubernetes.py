"""Pods of a JobSet: the first one holds the job, and every pod calls it as soon as it is up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem, UserError
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starters.door import Called, Door

FOLDER_ENV = "DISTUI_JOBSET"
"""Where a pod has the job's Secret: token, certificate and key."""
PORT = 41700


class KubernetesStarter:
    """Starts commands in pods that call; what starts the pods is the JobSet."""

    one_machine = True
    """Pods may share a node."""
    way = "pod"

    def __init__(self, cluster: ClusterSection) -> None:
        folder = os.environ.get(FOLDER_ENV)
        if folder is None:
            raise UserError(
                "cluster.starter is kubernetes, and this is no pod of a JobSet of distui",
                f"{FOLDER_ENV} is not set: agents are started in pods that call the first one",
                "distui launch --k8s SCRIPT makes the JobSet; --k8s --dry-run prints it",
            )
        self._folder = Path(folder)
        self._door: Door | None = None

    async def address(self, host: Host) -> str:
        """Return nothing: a pod has an address once it is up, and calls then."""
        return ""

    async def start(self, host: Host, command: Sequence[str]) -> Called:
        """Have the pod run `command` when it calls."""
        if self._door is None:
            token, pem, key = ((self._folder / name).read_bytes() for name in ("token", "cert.pem", "key.pem"))
            self._door = Door(token.decode().strip(), (pem, key))
            await self._door.open("", PORT)
        return self._door.start(host, command)

    async def close(self, status: int) -> None:
        """Let the pods end."""
        if self._door is not None:
            await self._door.close(status)

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return its last words."""
        last = next((line for line in reversed(said.splitlines()) if line.strip()), f"exit status {status}")
        fix = f"kubectl logs {host.name.partition('.')[0]}: is the image the same, with distui in it?"
        return Problem(host.name, f"the agent in it could not start (exit status {status})", last, fix)
