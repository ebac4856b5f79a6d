"""`distui cluster check`: what each host has, who reaches whom, and what is to be mended; no rank is started."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distui.core.config.schema import Config
from distui.core.config.settings import to_toml
from distui.core.errors import Problem
from distui.core.paths import RunFolder, write_own
from distui.launcher.cluster.crew import Crew
from distui.launcher.cluster.gang import Gang, Member
from distui.launcher.cluster.hello import compare, remarks
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starter import load_starter
from distui.launcher.node.facts import gather

LOOK_S = 0.5
LEAVE_S = 2.0


@dataclass(slots=True)
class Checked:
    """What was found."""

    gang: Gang
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_hosts(config: Config, hosts: Sequence[Host], target: Sequence[str]) -> Checked:
    """Start an agent on each host, ask it, and let it go. Raises: UserError."""
    with tempfile.TemporaryDirectory(prefix="distui-check-") as parent:
        run = RunFolder(Path(parent) / "check")
        run.create()
        write_own(run.config, to_toml(config))
        write_own(run.spec, "{}")
        return asyncio.run(_check(run, config, hosts, target))


async def _check(run: RunFolder, config: Config, hosts: Sequence[Host], target: Sequence[str]) -> Checked:
    starter = load_starter(config.cluster)
    crew = Crew(run, config, hosts, starter, list(target), None, lambda node, said: None, only_checks=True)
    gang = crew.gang
    try:
        await crew.open()
        gang.begin_meeting()
        for member in gang.members:
            crew.start(member.node)
        while not gang.all_here() and not gang.refused():
            await crew.something(LOOK_S)
            gang.lose_silent()
            for member in gang.members:
                if member.stage == "lost":
                    what = "its agent was lost while it was asked"
                    gang.failed(member.node, Problem(member.host.name, what, member.lost, "check again"))
        found = Checked(gang, gang.refused())
        hellos = {member.node: member.hello for member in gang.members if member.hello is not None}
        here = gather(os.getcwd(), crew.files, crew.optional)
        found.problems += compare(hosts, hellos, here, one_machine=starter.one_machine)
        found.problems += await crew.reach()
        found.remarks = remarks(hosts, hellos, crew.offsets_s)
        return found
    finally:
        await crew.leave(LEAVE_S)


def row(member: Member, words: str = "") -> list[str]:
    """Return a host's row of the table; `words` say how far it has come, where it is not here."""
    hello = member.hello
    if hello is None:
        return [member.host.name, words, *["n/a"] * 7]
    return [
        member.host.name,
        "ok",
        f"{hello.address} ({hello.interface or 'n/a'})",
        str(member.host.num_ranks),
        str(hello.num_gpus),
        str(hello.num_cores),
        f"{hello.memory_bytes / 2**30:.1f} GiB",
        hello.versions.get("torch") or "n/a",
        hello.versions.get("python") or "n/a",
    ]


COLUMNS = ("host", "state", "address", "ranks", "GPUs", "cores", "free memory", "torch", "Python")
