"""The process that holds a job on many hosts: `python -m distui.launcher.cluster.supervisor <run folder>`.

The command line starts it as it starts the agent of one node, and it keeps the same promises: it ends when the job has,
writes outcome.json first, SIGTERM stops the job, and nothing of the job outlives it, on any host. It trains nothing and
imports no torch. See docs/clusters.md for what happens when something goes wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.errors import (
    EXIT_BUG,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_RANK_FAILED,
    EXIT_USER,
    ConfigError,
    Problem,
    UserError,
)
from distui.core.paths import RunFolder, read_json, write_own
from distui.launcher.cluster.attempt import Attempt, Logs
from distui.launcher.cluster.crew import SWEEP_S, Crew
from distui.launcher.cluster.elastic import fitting, take_spares, too_few
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hello import compare, remarks
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starter import load_starter
from distui.launcher.cluster.tree import Tree
from distui.launcher.cluster.verdict import first_cause
from distui.launcher.job.outcome import Outcome, RankOutcome, gave_way, preempted_words
from distui.launcher.job.processes import AGENT_PID_ENV, GRACE_S, die_with_parent, kill_job, stop_requested
from distui.launcher.node.facts import gather
from distui.launcher.node.restarts import Restarts, newest_checkpoint, restart_words, say_notice
from distui.proto import cluster_pb2 as pb

AWAITED_S = 10.0
"""Between two lines of who is awaited."""
STORE_S = 15.0
SETTLE_S = 0.3
"""A failure's peers fail of it at once: so long is waited for the first cause to be told too."""
SUSPECT_S = 3.0
SILENT_SWEEP_S = 3.0
SWEPT_S = GRACE_S + 2.0
LOOK_S = 0.5
LEAVE_S = 1.5
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Supervisor:
    """One job on many hosts, from the first agent to the last."""

    def __init__(self, run: RunFolder, spec: dict[str, Any], config: Config, command: list[str]) -> None:
        self._run, self._config, self._command = run, config, command
        self._hosts = [Host.of(one) for one in spec["hosts"]]
        self._config_file = Path(spec["config_file"]) if spec.get("config_file") else None
        self._starter = load_starter(config.cluster)
        self._restarts = Restarts(config.cluster.max_restarts)
        self._logs = Logs(run)
        self._attempt = Attempt(0, run, self._logs)
        spare = min(config.cluster.spare_nodes, len(self._hosts) - 1)
        self._active = list(range(len(self._hosts) - spare))
        """The nodes that the job goes on with, in the order of their ranks."""
        self._spares = list(range(len(self._active), len(self._hosts)))
        self._crew: Crew
        self._tree: Tree
        self._is_giving_way = False
        self.stopped_by: signal.Signals | None = None

    def stop(self, signum: signal.Signals) -> None:
        """Have the job ended; SIGTERM only has it give way, where that is what it means."""
        saves = self._config.cluster.on_preempt == "save" and not stop_requested(self._run)
        if signum == signal.SIGTERM and saves:
            self.preempt()
            return
        self.stopped_by = self.stopped_by or signum
        self._crew.changed.set()

    def preempt(self) -> None:
        """Have the ranks save at a step that they agree on, and end."""
        if self._is_giving_way:
            return
        self._is_giving_way = True
        self._notice("asked to give way: the ranks save at their next common step, and end with 75")
        for member in self._crew.gang.members:
            self._crew.say(member.node, preempt=pb.Preempt())

    def _notice(self, line: str) -> None:
        """Say a line to whoever started the job."""
        say_notice(self._run, line)

    async def supervise(self) -> Outcome:
        """Meet the hosts, run attempts, and return how the job ended; then no process of it is left on any host.

        Raises: UserError where the hosts cannot train together; nothing was started.
        """
        self._crew = Crew(
            self._run, self._config, self._hosts, self._starter, self._command, self._config_file, self._hear
        )
        self._tree = Tree(self._crew, self._notice)
        loop = asyncio.get_running_loop()
        for signum in _STOPPING:
            loop.add_signal_handler(signum, self.stop, signum)
        loop.add_signal_handler(signal.SIGUSR1, self.preempt)
        try:
            await self._crew.open()
            await self._meet(range(len(self._hosts)))
            while self.stopped_by is None:
                outcome = await self._run_attempt()
                if not await self._starts_again(outcome):
                    return outcome
            return self._stopped()
        finally:
            await self._crew.leave(LEAVE_S)
            kill_job(self._run)

    # ---- meeting -----------------------------------------------------------------------------------------------------

    async def _meet(self, nodes: Any) -> None:
        """Start the agents of `nodes` and wait for them. Raises: UserError where not all come, or they do not fit."""
        gang, crew, loop = self._crew.gang, self._crew, asyncio.get_running_loop()
        gang.begin_meeting()
        for node in nodes:
            crew.start(node)
        next_line_s = loop.time() + AWAITED_S
        while not gang.all_here() and self.stopped_by is None:
            await self._crew.something(LOOK_S)
            if problems := gang.refused():
                raise ConfigError(problems)
            if loop.time() >= next_line_s:
                next_line_s += AWAITED_S
                self._notice(gang.awaited())
        if self.stopped_by is not None:
            return
        hellos = {member.node: member.hello for member in gang.members if member.hello is not None}
        here = gather(os.getcwd(), crew.files, crew.optional)
        if problems := compare(self._hosts, hellos, here, one_machine=self._starter.one_machine):
            raise ConfigError(problems)
        if problems := await crew.reach():
            raise ConfigError(problems)
        for remark in remarks(self._hosts, hellos, crew.offsets_s):
            print(remark, flush=True)
        words = [f"{member.host.name} ({member.hello.address})" for member in gang.members if member.hello is not None]
        print(f"hosts: {', '.join(words)}; interface {hellos[0].interface}", flush=True)

    def _hear(self, node: int, said: pb.AgentSays) -> None:
        if said.WhichOneof("body") == "daemon":
            self._tree.heard(node, said.daemon)
        self._attempt.hear(node, said)

    # ---- an attempt --------------------------------------------------------------------------------------------------

    def _places(self) -> dict[int, tuple[int, int]]:
        """Return each node's first rank and number of ranks."""
        found, first = {}, 0
        for node in self._active:
            found[node] = (first, self._hosts[node].num_ranks)
            first += self._hosts[node].num_ranks
        return found

    async def _run_attempt(self) -> Outcome:
        attempt = self._attempt = Attempt(self._restarts.attempt, self._run, self._logs)
        gang, crew, loop = self._crew.gang, self._crew, asyncio.get_running_loop()
        places, head = self._places(), self._active[0]
        world_size = sum(count for _, count in places.values())
        if 0 < self._config.cluster.roll_up_hosts <= len(places) and self._config.telemetry.enabled:
            await self._tree.open(self._active, self._is_over)
        crew.say(head, open_store=pb.OpenStore(attempt=attempt.number))
        deadline_s = loop.time() + STORE_S
        while not attempt.port and not attempt.problems and not self._is_over():
            await self._crew.something(LOOK_S)
            if loop.time() > deadline_s:
                attempt.problems[head] = f"no port for the store came from it within {STORE_S:.0f} s"
        if attempt.port and not self._is_over():
            first_hello = gang.members[head].hello
            assert first_hello is not None
            self._restarts.ready(self._run, world_size, len(places))
            for place, (node, (first, count)) in enumerate(places.items()):
                start = pb.Start(
                    attempt=attempt.number,
                    max_restarts=self._config.cluster.max_restarts,
                    node=place,
                    num_nodes=len(places),
                    first_rank=first,
                    num_ranks=count,
                    world_size=world_size,
                    address=first_hello.address,
                    port=attempt.port,
                )
                crew.say(node, start=start)
        while not self._is_over():
            await self._crew.something(LOOK_S)
            for member in gang.lose_silent():
                then = "the ranks of the other hosts are ended" if member.node in places else "it was a spare"
                self._notice(f"{member.host.name} {member.lost}; {then}")
            self._forget_lost_spares()
            if not attempt.is_alone_told and attempt.done >= set(places) - {head}:
                attempt.is_alone_told = True
                crew.say(head, alone=pb.Alone())
            if attempt.done == set(places):
                break
        return await self._conclude(places)

    def _forget_lost_spares(self) -> None:
        members = self._crew.gang.members
        for node in self._spares:
            members[node].is_left_out = members[node].stage == "lost"
        self._spares = [node for node in self._spares if not members[node].is_left_out]

    def _lost(self) -> list[Member]:
        return [self._crew.gang.members[node] for node in self._active if self._crew.gang.members[node].stage == "lost"]

    def _is_over(self) -> bool:
        attempt = self._attempt
        return bool(self.stopped_by is not None or attempt.stopped or attempt.failed() or self._lost())

    async def _conclude(self, places: dict[int, tuple[int, int]]) -> Outcome:
        """End what runs, find the cause, and return the outcome."""
        attempt, gang = self._attempt, self._crew.gang
        if not self._is_over():
            return self._finished(places)
        # From here on ranks end because they are ended: their connections' ends are no losses.
        told = self.stopped_by and self.stopped_by.name
        if told is None and self._lost():
            told = f"the loss of {self._lost()[0].host.name}"  # whatever ranks say now comes of that
        bad = [asdict(ending) for ending in attempt.endings.values() if ending.bad]
        with contextlib.suppress(OSError):
            write_own(self._run.ending, json.dumps({"stopped_by": told or attempt.stopped or None, "ranks": bad}))
        if self.stopped_by is None and not attempt.stopped:
            await asyncio.sleep(SETTLE_S)
        for node in places:
            self._crew.say(node, end=pb.End(leave=False))
        sweeps = {member.node: asyncio.create_task(self._sweep(member)) for member in self._lost()}
        await self._wait_swept()
        if self.stopped_by is not None or attempt.stopped:
            return self._stopped()
        if attempt.problems:
            node, problem = next(iter(attempt.problems.items()))
            message = f"{gang.members[node].host.name} (node {node}): {problem}"
            return Outcome("failed", EXIT_RANK_FAILED, message)
        outcome = self._cause(places)
        if outcome.is_victim and not self._lost():
            await self._wait_for_silent()
            outcome = self._cause(places)
        for member in self._lost():
            await sweeps.setdefault(member.node, asyncio.create_task(self._sweep(member)))
        return self._cause(places)

    async def _sweep(self, member: Member) -> None:
        """End what a lost agent has left, and tell by that whether its host answers."""
        answered = await self._crew.sweep(member.node, SILENT_SWEEP_S if member.was_silent else SWEEP_S)
        member.answers = answered
        if answered:
            member.lost += "; the host answers by ssh: what was left of the job there has been ended"
        elif not member.was_silent:
            member.lost += "; the host does not answer"

    async def _wait_swept(self) -> None:
        """Wait until every agent that is there has ended its ranks."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + SWEPT_S
        while loop.time() < deadline_s:
            here = [node for node in self._active if self._crew.gang.members[node].here]
            if all(node in self._attempt.swept for node in here):
                return
            await self._crew.something(LOOK_S)
            self._crew.gang.lose_silent()

    async def _wait_for_silent(self) -> None:
        """Who only lost its peer says nothing of why: a host that is silent now may be the cause, or be heard again."""
        while self._crew.gang.silent(SUSPECT_S) and not self._lost() and self.stopped_by is None:
            await self._crew.something(LOOK_S)
            self._crew.gang.lose_silent()

    def _cause(self, places: dict[int, tuple[int, int]]) -> Outcome:
        began_s = time.time() - asyncio.get_running_loop().time()
        outcome = first_cause(self._run, self._attempt.endings, self._lost(), places, began_s)
        self._name_hosts(outcome.ranks, places)
        outcome.restarts = self._restarts.attempt
        return outcome

    def _name_hosts(self, ranks: list[RankOutcome], places: dict[int, tuple[int, int]]) -> None:
        for node, (first, count) in places.items():
            for rank in ranks[first : first + count]:
                rank.host, rank.step = self._hosts[node].name, self._attempt.steps.get(rank.rank)

    def _finished(self, places: dict[int, tuple[int, int]]) -> Outcome:
        ranks = [RankOutcome(rank, self._attempt.endings[rank].exit_status) for rank in sorted(self._attempt.endings)]
        self._name_hosts(ranks, places)
        restarts = self._restarts.attempt
        if gave_way(self._attempt.endings):
            message = preempted_words(max(self._attempt.steps.values(), default=None))
            return Outcome("stopped", EXIT_PREEMPTED, message, ranks=ranks, restarts=restarts)
        return Outcome("finished", EXIT_OK, "", ranks=ranks, restarts=restarts)

    def _stopped(self) -> Outcome:
        if self.stopped_by is not None:
            return Outcome("stopped", 128 + self.stopped_by, f"stopped by {self.stopped_by.name}")
        name = self._attempt.stopped
        if name == "control" or stop_requested(self._run):
            return Outcome("stopped", 128 + signal.SIGTERM, "stopped by distui control")
        return Outcome("stopped", 128 + signal.Signals[name], f"stopped by {name} to an agent")

    # ---- again -------------------------------------------------------------------------------------------------------

    async def _starts_again(self, outcome: Outcome) -> bool:
        """Prepare the next attempt, where there is to be one."""
        step = max(self._attempt.steps.values(), default=None)
        why_not = self._restarts.wanted(outcome, step)
        if why_not or self.stopped_by is not None:
            if outcome.state == "failed" and self._config.cluster.max_restarts and why_not:
                self._notice(f"not started again: {why_not}")
            return False
        num_ranks = sum(host.num_ranks for host in self._hosts)
        self._restarts.begin(self._run, outcome, step, num_ranks)
        newest = newest_checkpoint(self._run, self._config.checkpoint)
        self._notice(restart_words(outcome, self._restarts, newest))
        why_not = await self._bring_back()
        if why_not:
            self._notice(f"not started again: {why_not}")
            outcome.restarts = self._restarts.attempt - 1
        return not why_not and self.stopped_by is None

    async def _bring_back(self) -> str:
        """Start the agents of lost hosts again, or go on without; return why neither can be."""
        self._forget_lost_spares()
        for line in take_spares(self._active, self._spares, self._crew.gang.members, self._hosts):
            self._notice(line)
        lost = self._lost()
        if not lost:
            return ""
        least, why = self._config.cluster.min_nodes, "the host does not answer"
        if not least or all(member.answers for member in lost):
            try:
                await self._meet([member.node for member in lost])
                return ""
            except UserError as error:
                why = f"{error.what}: {error.why}"
                if not least:
                    return why
        left = [node for node in self._active if self._crew.gang.members[node].here]
        counts = [self._hosts[node].num_ranks for node in left]
        taken = fitting(self._config, counts, least)
        if not taken:
            return f"{why}; {too_few(self._config, counts, least)}"
        for node in set(self._active) - set(left[:taken]):
            self._crew.gang.members[node].is_left_out = True
        self._active = left[:taken]
        names = ", ".join(self._hosts[node].name for node in self._active)
        self._notice(f"going on with {taken} of {len(self._hosts)} hosts ({names}), {sum(counts[:taken])} ranks")
        return ""


async def run_job(run: RunFolder, command: list[str]) -> Outcome:
    """Hold the job of a folder, and return how it ended."""
    spec = read_json(run.spec)
    assert spec is not None, "the launcher writes run.json first"
    try:
        return await Supervisor(run, spec, load(run.config, {}, environ={}).config, command).supervise()
    except UserError as error:
        problems = error.problems if isinstance(error, ConfigError) else [Problem("", error.what, error.why, error.fix)]
        first = problems[0]
        where = f"{first.path}: " if first.path else ""
        return Outcome("failed", EXIT_USER, f"{where}{first.what}: {first.why}", report=error.report())


def main() -> None:
    """Run the job of the folder in argv and exit with its status."""
    run = RunFolder(Path(sys.argv[1]))
    die_with_parent(int(os.environ.pop(AGENT_PID_ENV)), signal.SIGINT)
    command = json.load(sys.stdin)
    try:
        outcome = asyncio.run(run_job(run, command))
    except Exception as error:  # noqa: BLE001  the outcome must be told, whatever it was
        traceback.print_exc()
        outcome = Outcome("failed", EXIT_BUG, f"the supervisor failed: {type(error).__name__}: {error}")
    try:
        outcome.write(run)
    except OSError as error:
        print(f"outcome.json cannot be written: {error}")
    sys.stdout.flush()
    os._exit(outcome.exit_status)


if __name__ == "__main__":
    main()
