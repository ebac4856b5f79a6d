"""Who is there, who is awaited, who has fallen silent: by a clock that the test turns."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distui.core.config.schema import Config
from distui.core.errors import Problem
from distui.core.paths import RunFolder
from distui.launcher.cluster.crew import Crew
from distui.launcher.cluster.gang import REFUSE_S, Gang
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starters.local import LocalStarter
from distui.launcher.node.link import DEAD_S
from tests.cluster.test_hello import HERE


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def gang_of(*names: str, meet_s: float = 300.0) -> tuple[Gang, Clock]:
    clock = Clock()
    return Gang([Host(name, 1) for name in names], clock, meet_s), clock


def test_it_tells_who_is_awaited_and_how_far_each_has_come() -> None:
    gang, clock = gang_of("a", "b", "c", "d")
    gang.joined(0, HERE)
    gang.came(1, "ssh")
    gang.came(2, "agent")
    gang.came(2, "ssh")
    clock.now_s += 10
    assert gang.awaited() == (
        "waiting for 3 of 4 hosts for 10 s: b (ssh up, agent not up), c (ssh up, agent up, not connected), "
        "d (ssh not up)"
    )
    assert not gang.refused() and not gang.all_here()


def test_a_failure_is_told_once_all_have_said_whether_they_come() -> None:
    gang, clock = gang_of("a", "b", "c")
    problem = Problem("b", "it cannot be used", "no route", "is it on?")
    gang.failed(1, problem)
    gang.joined(0, HERE)
    assert not gang.refused(), "c may have a problem too"
    gang.failed(2, Problem("c", "refused", "", ""))
    assert [one.path for one in gang.refused()] == ["b", "c"]
    slow, clock = gang_of("a", "b")
    slow.failed(0, problem)
    clock.now_s += REFUSE_S
    assert slow.refused() == [problem], "who is silent is not waited for, once it is certain that all is in vain"


def test_the_time_to_meet_ends_and_names_all_who_are_missing() -> None:
    gang, clock = gang_of("a", "b", "c", meet_s=30.0)
    gang.joined(0, HERE)
    gang.came(1, "agent")
    clock.now_s += 29
    assert not gang.refused()
    clock.now_s += 2
    found = gang.refused()
    assert [(one.path, one.why) for one in found] == [("b", "ssh up, agent up, not connected"), ("c", "ssh not up")]
    assert "within 30 s" in found[0].what


def test_silence_is_suspected_and_then_taken_for_the_end() -> None:
    gang, clock = gang_of("a", "b", "c")
    for node in range(3):
        gang.joined(node, HERE)
    clock.now_s += DEAD_S - 1
    gang.heard(0)
    gang.heard(1)
    assert [member.node for member in gang.silent(5.0)] == [2] and not gang.lose_silent()
    clock.now_s += 2
    (gone,) = gang.lose_silent()
    assert gone.node == 2 and gone.was_silent and "link is down" in gone.lost and "no other host" not in gone.lost
    assert not gang.lose_silent() and not gang.lose(2, "again"), "a host is lost once"


def test_where_nobody_answers_the_link_of_this_host_is_named() -> None:
    gang, clock = gang_of("a", "b", "c")
    for node in range(3):
        gang.joined(node, HERE)
    clock.now_s += DEAD_S + 1
    assert all("look at the link of this one" in member.lost for member in gang.lose_silent())


def test_an_agent_that_is_lost_while_others_are_awaited_is_started_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    config = Config.model_validate({"cluster": {"hosts": "a:1,b:1", "starter": "local"}})
    hosts = [Host("a", 1), Host("b", 1)]
    run.config.write_text("")
    run.spec.write_text("{}")
    told: list[str] = []

    async def meet() -> None:
        crew = Crew(run, config, hosts, LocalStarter(config.cluster), ["-m", "x"], None, lambda node, said: None)
        try:
            await crew.open()
            crew.start(1)
            while not crew.gang.members[1].here:
                await crew.something(60.0)
            crew._processes[1].kill()
            while crew.gang.members[1].here:
                await crew.something(60.0)
            await crew.meet([0], told.append, lambda: False)
            assert crew.gang.all_here() and crew.gang.members[1].losses == 1
        finally:
            await crew.leave(5.0)

    asyncio.run(meet())
    assert told[0].startswith("b its agent, or its session, has ended"), told
    assert told[0].endswith("its agent is started again")
