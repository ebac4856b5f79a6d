"""With which hosts a job goes on, once some are lost: spares, fewer, later more; the global batch stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hosts import Host

if TYPE_CHECKING:
    from distui.launcher.cluster.crew import Crew

RETURN_S = 60.0
"""A host that is tried again has so long to come."""
LOOK_S = 0.5


def problems_with(config: Config, counts: Sequence[int]) -> list[str]:
    """Return what keeps a job from training with hosts of so many ranks each."""
    smaller = config.model_copy(deep=True)
    smaller.cluster.hosts = ",".join(f"node{number}:{count}" for number, count in enumerate(counts))
    smaller.cluster.nodes, smaller.cluster.min_nodes, smaller.cluster.spare_nodes = len(counts), 0, 0
    return [f"{problem.what}: {problem.why}" for problem in check(smaller, None, sum(counts))]


MAX_LOSSES = 2
"""A host that was lost so often is not used again, where there is a spare, and does not come back."""


class Roster:
    """Which of a job's hosts have ranks, which are spare, and which it goes on without. Nodes are places among them."""

    def __init__(self, config: Config, hosts: Sequence[Host], members: Sequence[Member]) -> None:
        self._config, self._hosts, self._members = config, hosts, members
        spare = min(config.cluster.spare_nodes, len(hosts) - 1)
        self.full = len(hosts) - spare
        """How many hosts the job has where none is lost."""
        self.active = list(range(self.full))
        """The nodes that the job goes on with, in the order of their ranks."""
        self.spares = list(range(self.full, len(hosts)))

    def places(self) -> dict[int, tuple[int, int]]:
        """Return each node's first rank and number of ranks."""
        found, first = {}, 0
        for node in self.active:
            found[node] = (first, self._hosts[node].num_ranks)
            first += self._hosts[node].num_ranks
        return found

    def lost(self) -> list[Member]:
        """Return who has ranks and is not there."""
        return [self._members[node] for node in self.active if self._members[node].stage == "lost"]

    def partner(self, node: int) -> int | None:
        """Return the node that keeps copies of what another one has in memory: the next one that is there."""
        ring = [one for one in (*self.active, *self.spares) if self._members[one].here]
        if node not in ring or len(ring) < 2:
            return None
        return ring[(ring.index(node) + 1) % len(ring)]

    def forget_lost_spares(self) -> None:
        """Go on without spares that are gone."""
        for node in [node for node in self.spares if self._members[node].stage == "lost"]:
            self.leave_out(node)

    def leave_out(self, node: int) -> None:
        """Go on without a host, until it comes back."""
        self._members[node].is_left_out = True
        self.active, self.spares = ([one for one in kept if one != node] for kept in (self.active, self.spares))

    def left_out(self) -> list[Member]:
        """Return whom the job goes on without and may try again."""
        return [one for one in self._members if one.is_left_out and one.losses < MAX_LOSSES]

    def take_spares(self) -> list[str]:
        """Put spares in the places of lost hosts; return a line for each.

        A host whose agent alone was lost is used again, unless that has happened before.
        """
        told = []
        for place, node in enumerate(self.active):
            member, hosts = self._members[node], self._hosts
            if member.stage != "lost" or (member.answers and not member.was_silent and member.losses < MAX_LOSSES):
                continue
            ranks = hosts[node].num_ranks
            fit = (one for one in self.spares if self._members[one].here and hosts[one].num_ranks == ranks)
            if (chosen := next(fit, None)) is None:
                continue
            self.spares.remove(chosen)
            self.active[place], member.is_left_out = chosen, True
            left = f"{len(self.spares)} spare{'s' * (len(self.spares) != 1)} left"
            told.append(f"{hosts[chosen].name} takes the place of {hosts[node].name}; {left}")
        return told

    def shrink(self) -> str:
        """Go on with as many as will do of the hosts that are there; return the line that tells, "" where none will."""
        left = [node for node in self.active if self._members[node].here]
        counts = [self._hosts[node].num_ranks for node in left]
        taken = fitting(self._config, counts, self._config.cluster.min_nodes)
        if not taken:
            return ""
        for node in set(self.active) - set(left[:taken]):
            if node in left:
                self.spares.append(node)  # it is there, and comes in with the next that does
            else:
                self._members[node].is_left_out = True
        self.active = left[:taken]
        return f"going on with {self.words()}"

    def grown(self) -> list[int]:
        """Return the nodes that a job with too few hosts could go on with, of all that are there."""
        if len(self.active) >= self.full:
            return self.active
        there = sorted([*self.active, *(node for node in self.spares if self._members[node].here)])[: self.full]
        taken = fitting(self._config, [self._hosts[node].num_ranks for node in there], len(self.active) + 1)
        return there[:taken] if taken and set(there[:taken]) > set(self.active) else self.active

    def grow(self, nodes: list[int]) -> None:
        """Give ranks to `nodes`, which are spares as far as they are new."""
        self.spares = [node for node in self.spares if node not in nodes]
        self.active = nodes

    def words(self) -> str:
        """Return how many and which hosts have ranks."""
        names = ", ".join(self._hosts[node].name for node in self.active)
        num_ranks = sum(self._hosts[node].num_ranks for node in self.active)
        return f"{len(self.active)} of {len(self._hosts)} hosts ({names}), {num_ranks} ranks"

    def too_few(self) -> str:
        """Return why the job cannot go on with the hosts that are left."""
        there = [node for node in self.active if self._members[node].here]
        return too_few(self._config, [self._hosts[node].num_ranks for node in there], self._config.cluster.min_nodes)


async def look_for_lost(
    roster: Roster, crew: Crew, every_s: float, notice: Callable[[str], None], then: Callable[[], None]
) -> None:
    """Try the hosts that a job goes on without, again and again; who is back is a spare. `then` is called each time."""
    told: dict[int, str] = {}
    while every_s:
        await asyncio.sleep(every_s)
        for member in roster.left_out():
            why_not = await come_back(member, crew)
            if not why_not:
                member.is_left_out = False
                roster.spares.append(member.node)
                notice(f"{member.host.name} is back")
            elif why_not != told.get(member.node):
                print(f"{member.host.name} is tried again each {every_s:.0f} s: {why_not}", flush=True)
            told[member.node] = why_not
        then()


async def come_back(member: Member, crew: Crew) -> str:
    """Start the agent of a host that a job goes on without; return why it cannot take part, "" once it can."""
    loop = asyncio.get_running_loop()
    if not member.here:
        crew.start(member.node)
    deadline_s = loop.time() + RETURN_S
    while not member.here and member.problem is None and loop.time() < deadline_s:
        await asyncio.sleep(LOOK_S)  # that something has happened is the attempt's to hear
    if member.problem is not None:
        return f"{member.problem.what}: {member.problem.why}"
    if not member.here:
        return crew.gang.words(member)
    problems = [one for one in crew.differences() if member.host.name in one.path.split(", ")]
    return f"{problems[0].what}: {problems[0].why}" if problems else ""


def fitting(config: Config, counts: Sequence[int], least: int) -> int:
    """Return how many of the hosts that are left are taken, from the first on; 0 where no number will do."""
    return next((taken for taken in range(len(counts), least - 1, -1) if not problems_with(config, counts[:taken])), 0)


def too_few(config: Config, counts: Sequence[int], least: int) -> str:
    """Return why a job cannot go on with the hosts that are left."""
    if len(counts) < least:
        return f"{len(counts)} hosts are left, and cluster.min_nodes is {least}"
    return f"{len(counts)} hosts with {sum(counts)} ranks are left: {'; '.join(problems_with(config, counts))}"
