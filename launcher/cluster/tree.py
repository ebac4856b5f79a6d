"""The tree of daemons of a job on many hosts: who is above whom, and how the ones below get in.

    hosts' daemons ──> the first of each group of hosts ──> the head, through that host's agent

Nothing is typed for it. Whose daemon does not come up sends its telemetry to the head, as the ranks of few hosts do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from distui.launcher.cluster.crew import Crew
from distui.proto import cluster_pb2 as pb

FAN_IN = 32
OPEN_S = 45.0


def groups(nodes: Sequence[int], fan_in: int = FAN_IN) -> list[list[int]]:
    """Return the nodes in groups, each led by its first; as many groups as members where both would be too many."""
    if len(nodes) <= fan_in:
        return [[node] for node in nodes]
    size = max(fan_in, math.isqrt(len(nodes) - 1) + 1)
    return [list(nodes[start : start + size]) for start in range(0, len(nodes), size)]


class Tree:
    """The daemons of a job's hosts, opened anew for each attempt. Used on one event loop."""

    def __init__(self, crew: Crew, tell: Callable[[str], None]) -> None:
        self._crew, self._tell = crew, tell
        self._at: dict[int, pb.DaemonAt] = {}

    def heard(self, node: int, told: pb.DaemonAt) -> None:
        """Take in where the daemon of a node is."""
        self._at[node] = told

    async def open(self, nodes: Sequence[int], over: Callable[[], bool]) -> None:
        """Have the daemons of `nodes` started, those above first, until `over`."""
        self._at = {}
        planned = groups(nodes)
        for leader, *others in planned:
            self._ask(leader, pb.OpenDaemon(serves=bool(others)))
        await self._until([group[0] for group in planned], over)
        for leader, *others in planned:
            above = self._at.get(leader, pb.DaemonAt(problem="it has not come up in time"))
            if above.problem:
                continue  # these hosts speak to the head themselves
            for node in others:
                self._ask(node, pb.OpenDaemon(parent=above.address, certificate=above.certificate, token=above.token))
        waited = [node for leader, *others in planned if not self._problem(leader) for node in others]
        await self._until(waited, over)
        failed = [node for node in nodes if self._problem(node)]
        if failed and not over():
            names = ", ".join(self._crew.gang.members[node].host.name for node in failed[:8])
            self._tell(f"the telemetry of {names} is not rolled up: {self._problem(failed[0])}")

    def _ask(self, node: int, asked: pb.OpenDaemon) -> None:
        asked.name = self._crew.gang.members[node].host.name
        self._crew.say(node, open_daemon=asked)

    def _problem(self, node: int) -> str:
        return self._at[node].problem if node in self._at else "its daemon, or that above it, has not come up"

    async def _until(self, nodes: Sequence[int], over: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + OPEN_S
        while not all(node in self._at for node in nodes) and not over() and loop.time() < deadline_s:
            await self._crew.something(0.5)
