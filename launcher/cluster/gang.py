"""Who of a job's hosts is there, how far the others have come, and who has fallen silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distui.core.errors import Problem
from distui.launcher.cluster.hosts import Host
from distui.launcher.node.facts import Hello
from distui.launcher.node.link import DEAD_S

SUSPECT_S = 5.0
REFUSE_S = 12.0
"""After so long what has gone wrong is told, though not all hosts have said whether they come."""
STAGES = {
    "starting": "WAY not up",
    "ssh": "WAY up, agent not up",
    "agent": "WAY up, agent up, not connected",
    "here": "connected",
    "lost": "lost",
}
"""How far a host has come, in the order in which it comes; WAY is how it is reached: ssh, srun."""


@dataclass(slots=True)
class Member:
    """One host of the job."""

    host: Host
    node: int
    stage: str = "starting"
    note: str = ""
    """What is known of why it has not come further."""
    problem: Problem | None = None
    """Why it will not come."""
    hello: Hello | None = None
    heard_s: float = 0.0
    lost: str = ""
    """Why it is not there any more."""
    lost_s: float = 0.0
    was_silent: bool = False
    """Whether it is lost because it did not answer."""
    answers: bool = True
    """Whether its host let a second login in, once the agent was lost."""

    losses: int = 0
    is_left_out: bool = False
    """Whether the job goes on without it."""

    @property
    def here(self) -> bool:
        """Whether its agent is connected."""
        return self.stage == "here"


class Gang:
    """The hosts of a job. `clock` gives seconds that only ever grow."""

    def __init__(self, hosts: Sequence[Host], clock: Callable[[], float], meet_s: float, way: str = "ssh") -> None:
        self._way = way
        self.members = [Member(host, node) for node, host in enumerate(hosts)]
        self._clock, self._meet_s = clock, meet_s
        self._began_s = clock()

    def begin_meeting(self) -> None:
        """Count the time to meet from now on."""
        self._began_s = self._clock()

    # ---- meeting -----------------------------------------------------------------------------------------------------

    def came(self, node: int, stage: str, note: str = "") -> None:
        """Note how far a host has come; never a step back."""
        member, order = self.members[node], list(STAGES)
        member.note = note or member.note
        if order.index(stage) > order.index(member.stage):
            member.stage = stage

    def joined(self, node: int, hello: Hello) -> None:
        """Note that a host's agent is connected."""
        member = self.members[node]
        member.stage, member.hello, member.heard_s, member.note, member.lost = "here", hello, self._clock(), "", ""
        member.was_silent, member.answers = False, True

    def failed(self, node: int, problem: Problem) -> None:
        """Note that a host will not come."""
        self.members[node].problem = self.members[node].problem or problem

    def words(self, member: Member) -> str:
        """Return how far a host has come."""
        return member.note or STAGES[member.stage].replace("WAY", self._way)

    def all_here(self) -> bool:
        """Tell whether every agent is connected that the job goes on with."""
        return all(member.here for member in self.members if not member.is_left_out)

    def awaited(self) -> str:
        """Return the line that tells who is awaited, and how far each got."""
        late = [member for member in self.members if not member.here and not member.is_left_out]
        words = [f"{member.host.name} ({self.words(member)})" for member in late[:8]]
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        waited_s = self._clock() - self._began_s
        return f"waiting for {len(late)} of {len(self.members)} hosts for {waited_s:.0f} s: {', '.join(words)}{more}"

    def refused(self) -> list[Problem]:
        """Return why the hosts cannot meet, once that is certain; empty while they may."""
        members = [member for member in self.members if not member.is_left_out]
        known = [member.problem for member in members if member.problem is not None]
        waited_s = self._clock() - self._began_s
        settled = all(member.here or member.problem is not None for member in members)  # who is lost is started again
        if known and (settled or waited_s >= REFUSE_S):
            return known
        if waited_s < self._meet_s or self.all_here():
            return []
        found = []
        for member in members:
            if not member.here:
                what = f"it has not come within {self._meet_s:.0f} s"
                fix = "look at it by hand, or wait longer: --set cluster.meet_s=600"
                problem = Problem(member.host.name, what, self.words(member), fix)
                found.append(member.problem or problem)
        return found

    # ---- being there -------------------------------------------------------------------------------------------------

    def heard(self, node: int) -> None:
        """Note a sign of life."""
        self.members[node].heard_s = self._clock()

    def lose(self, node: int, why: str) -> bool:
        """Note that a host's agent is gone; False where that was known."""
        member = self.members[node]
        if member.stage == "lost":
            return False
        member.stage, member.lost, member.lost_s = "lost", why, self._clock()
        member.losses += 1
        return True

    def silent(self, after_s: float) -> list[Member]:
        """Return who is connected and has not been heard for so long."""
        now = self._clock()
        return [member for member in self.members if member.here and now - member.heard_s > after_s]

    def lose_silent(self) -> list[Member]:
        """Take for lost whoever has been silent for `DEAD_S`, and return them."""
        gone = self.silent(DEAD_S)
        others = [member for member in self.members if member.here and member not in gone]
        remote = [member for member in self.members if member.hello is not None]
        for member in gone:
            silent_s = self._clock() - member.heard_s
            why = f"has not answered for {silent_s:.0f} s: its link is down, or the host is"
            if len(gone) > 1 and not others and len(remote) > 2:
                why += " (no other host answers either: look at the link of this one)"
            self.lose(member.node, why)
            member.was_silent = True
        return gone
