"""What a starter is, and where they are found: those of `starters/`, or an entry point in `distui.starters`."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem, UserError
from distui.launcher.cluster.hosts import Host

GROUP = "distui.starters"
OURS = {
    "ssh": "SshStarter",
    "slurm": "SlurmStarter",
    "local": "LocalStarter",
    "kubernetes": "KubernetesStarter",
    "ray": "RayStarter",
}
"""Those of `starters/`, a module each of the same name."""


class Starter(Protocol):
    """Starts a command on a host, and gives its stdin, stdout and stderr.

    The command must end, or see the end of its stdin, when the process here ends: nothing else ends it if this side is
    killed. A starter may have `async def close(self, status: int)`, which is called once the job is over.
    """

    one_machine: bool
    """Whether several hosts may be the same machine, on purpose."""

    def __init__(self, cluster: ClusterSection) -> None: ...

    async def address(self, host: Host) -> str:
        """Return the name or address by which this side's network knows the host; "" where only the starter does."""
        ...

    async def start(self, host: Host, command: Sequence[str]) -> asyncio.subprocess.Process:
        """Start `command` there, with pipes for its three streams. Raises: OSError."""
        ...

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return why a command ended with `status`, before it had begun to work, having `said` this on stderr."""
        ...


def load_starter(cluster: ClusterSection) -> Starter:
    """Return the starter that `cluster.starter` names. Raises: UserError where there is none of that name."""
    name = cluster.starter
    if name in OURS:
        ours: Starter = getattr(import_module(f"distui.launcher.cluster.starters.{name}"), OURS[name])(cluster)
        return ours
    others = {found.name: found for found in entry_points(group=GROUP)}
    if name not in others:
        known = sorted({*OURS, *others})
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"cluster.starter: there is no starter {name!r}",
            f"installed are {', '.join(known)}",
            f"write {near[0]}" if near else f"install the package that brings it (entry point {GROUP})",
        )
    starter: Starter = others[name].load()(cluster)
    return starter
