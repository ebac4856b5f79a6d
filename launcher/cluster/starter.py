"""What a starter is, and where they are found: `ssh`, `local`, or an entry point in `distui.starters`."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem, UserError
from distui.launcher.cluster.hosts import Host

GROUP = "distui.starters"


class Starter(Protocol):
    """Starts a command on a host, and gives its stdin, stdout and stderr.

    The command must end, or see the end of its stdin, when the process here ends: nothing else ends it if this side is
    killed.
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
    known = {found.name: found for found in entry_points(group=GROUP)}
    if cluster.starter not in known:
        near = difflib.get_close_matches(cluster.starter, known, n=1)
        raise UserError(
            f"cluster.starter: there is no starter {cluster.starter!r}",
            f"installed are {', '.join(sorted(known))}",
            f"write {near[0]}" if near else "install the package that brings it (entry point distui.starters)",
        )
    starter: Starter = known[cluster.starter].load()(cluster)
    return starter
