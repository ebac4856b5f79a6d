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
from collections.abc import Sequence
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
from distui.launcher.cluster.elastic import Roster, look_for_lost
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starter import load_starter
from distui.launcher.cluster.tree import Tree
from distui.launcher.cluster.verdict import first_cause, name_hosts
from distui.launcher.job.outcome import Outcome, RankOutcome, gave_way, preempted_words
from distui.launcher.job.processes import AGENT_PID_ENV, die_with_parent, kill_job, stop_requested
from distui.launcher.memory.shelves import Shelves
from distui.launcher.node.restarts import Restarts, newest_checkpoint, restart_words, say_notice
from distui.proto import cluster_pb2 as pb

STORE_S = 15.0
SETTLE_S = 0.3
"""A failure's peers fail of it at once: so long is waited for the first cause to be told too."""
SUSPECT_S = 3.0
SILENT_SWEEP_S = 3.0
SWEPT_S = 30.0
"""An agent that answers ends its ranks in 4 s; on a host that has much else to do it takes longer."""
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
        self._num_ranks = sum(host.num_ranks for host in self._hosts)
        self._roster: Roster
        self._shelves: Shelves
        self._crew: Crew
        self._tree: Tree
        self._grows_to: list[int] = []
        """The nodes with which the job goes on once its ranks have saved for it."""
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
        self._roster = Roster(self._config, self._hosts, self._crew.gang.members)
        self._shelves = Shelves(self._crew.gang.members)
        returning: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        for signum in _STOPPING:
            loop.add_signal_handler(signum, self.stop, signum)
        loop.add_signal_handler(signal.SIGUSR1, self.preempt)
        try:
            await self._crew.open()
            await self._meet(list(range(len(self._hosts))))
            every_s = self._config.cluster.retry_s
            looking = look_for_lost(self._roster, self._crew, every_s, self._notice, self._ask_to_grow)
            returning = asyncio.create_task(looking)
            while self.stopped_by is None:
                outcome = await self._run_attempt()
                if not await self._grows(outcome) and not await self._starts_again(outcome):
                    return outcome
            return self._stopped()
        finally:
            if returning is not None:
                returning.cancel()
            await self._crew.leave(LEAVE_S)
            kill_job(self._run)

    async def _meet(self, nodes: Sequence[int]) -> None:
        """Start the agents of `nodes` and wait for them. Raises: UserError where not all come, or they do not fit."""
        await self._crew.meet(nodes, self._notice, lambda: self.stopped_by is not None)

    def _hear(self, node: int, said: pb.AgentSays) -> None:
        if said.WhichOneof("body") == "daemon":
            self._tree.heard(node, said.daemon)
        elif said.WhichOneof("body") == "kept":
            if said.kept.problem:
                self._notice(f"{self._hosts[node].name}: {said.kept.problem}")
            if self._shelves.kept(node, said.kept):  # all keep it: older ones may go
                self._crew.say_all(settled=pb.Settled(save=said.kept.save.save))
        self._attempt.hear(node, said)

    # ---- an attempt --------------------------------------------------------------------------------------------------

    async def _run_attempt(self) -> Outcome:
        attempt = self._attempt = Attempt(self._restarts.attempt, self._run, self._logs)
        gang, crew, loop = self._crew.gang, self._crew, asyncio.get_running_loop()
        places, head = self._roster.places(), self._roster.active[0]
        save = self._shelves.newest()
        world_size = sum(count for _, count in places.values())
        if 0 < self._config.cluster.roll_up_hosts <= len(places) and self._config.telemetry.enabled:
            await self._tree.open(self._roster.active, self._is_over)
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
                self._shelves.add_to(start, node, self._roster.partner(node), save)
                crew.say(node, start=start)
            attempt.is_running = True
        while not self._is_over():
            await self._crew.something(LOOK_S)
            for member in gang.lose_silent():
                then = "the ranks of the other hosts are ended" if member.node in places else "it was a spare"
                self._notice(f"{member.host.name} {member.lost}; {then}")
            self._roster.forget_lost_spares()
            if not attempt.is_alone_told and attempt.done >= set(places) - {head}:
                attempt.is_alone_told = True
                crew.say(head, alone=pb.Alone())
            if attempt.done == set(places):
                break
        return await self._conclude(places)

    def _is_over(self) -> bool:
        attempt = self._attempt
        return bool(self.stopped_by is not None or attempt.stopped or attempt.failed() or self._roster.lost())

    async def _conclude(self, places: dict[int, tuple[int, int]]) -> Outcome:
        """End what runs, find the cause, and return the outcome."""
        attempt, gang = self._attempt, self._crew.gang
        if not self._is_over():
            return self._finished(places)
        # From here on ranks end because they are ended: their connections' ends are no losses.
        told = self.stopped_by and self.stopped_by.name
        if told is None and self._roster.lost():
            told = f"the loss of {self._roster.lost()[0].host.name}"  # whatever ranks say now comes of that
        bad = [asdict(ending) for ending in attempt.endings.values() if ending.bad]
        with contextlib.suppress(OSError):
            write_own(self._run.ending, json.dumps({"stopped_by": told or attempt.stopped or None, "ranks": bad}))
        if self.stopped_by is None and not attempt.stopped:
            await asyncio.sleep(SETTLE_S)
        for node in places:
            self._crew.say(node, end=pb.End(leave=False))
        sweeps = {member.node: asyncio.create_task(self._sweep(member)) for member in self._roster.lost()}
        await self._wait_swept()
        if self.stopped_by is not None or attempt.stopped:
            return self._stopped()
        if attempt.problems:
            await asyncio.gather(*sweeps.values())
            node, problem = next(iter(attempt.problems.items()))
            message = f"{gang.members[node].host.name} (node {node}): {problem}"
            return Outcome("failed", EXIT_RANK_FAILED, message)
        outcome = self._cause(places)
        if outcome.is_victim and not self._roster.lost():
            await self._wait_for_silent()
            outcome = self._cause(places)
        for member in self._roster.lost():
            if member.node not in sweeps:  # one each: a second one would end what is started next
                sweeps[member.node] = asyncio.create_task(self._sweep(member))
            await sweeps[member.node]
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
            here = [node for node in self._roster.active if self._crew.gang.members[node].here]
            if all(node in self._attempt.swept for node in here):
                return
            await self._crew.something(LOOK_S)
            self._crew.gang.lose_silent()

    async def _wait_for_silent(self) -> None:
        """Who only lost its peer says nothing of why: a host that is silent now may be the cause, or be heard again."""
        while self._crew.gang.silent(SUSPECT_S) and not self._roster.lost() and self.stopped_by is None:
            await self._crew.something(LOOK_S)
            self._crew.gang.lose_silent()

    def _cause(self, places: dict[int, tuple[int, int]]) -> Outcome:
        began_s = time.time() - asyncio.get_running_loop().time()
        outcome = first_cause(self._run, self._attempt.endings, self._roster.lost(), places, began_s)
        name_hosts(outcome.ranks, places, self._hosts, self._attempt.steps)
        outcome.restarts = self._restarts.attempt
        return outcome

    def _finished(self, places: dict[int, tuple[int, int]]) -> Outcome:
        ranks = [RankOutcome(rank, self._attempt.endings[rank].exit_status) for rank in sorted(self._attempt.endings)]
        name_hosts(ranks, places, self._hosts, self._attempt.steps)
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
        self._restarts.begin(self._run, outcome, step, self._num_ranks)
        newest = newest_checkpoint(self._run, self._config.checkpoint)
        in_memory = self._shelves.step(self._shelves.newest())
        self._notice(restart_words(outcome, self._restarts, newest, in_memory))
        why_not = await self._bring_back()
        if why_not:
            self._notice(f"not started again: {why_not}")
            outcome.restarts = self._restarts.attempt - 1
        return not why_not and self.stopped_by is None

    async def _bring_back(self) -> str:
        """Start the agents of lost hosts again, or go on without; return why neither can be."""
        roster = self._roster
        roster.forget_lost_spares()
        for line in roster.take_spares():
            self._notice(line)
        lost = roster.lost()
        if not lost:
            roster.grow(roster.grown())
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
        if not (words := roster.shrink()):
            return f"{why}; {roster.too_few()}"
        roster.grow(roster.grown())
        self._notice(words)
        return ""

    # ---- growing again -----------------------------------------------------------------------------------------------

    def _ask_to_grow(self) -> None:
        """Have the ranks save, where there are hosts that have none: they are started again with those."""
        roster = self._roster
        nodes = roster.grown()
        if nodes is roster.active or self._grows_to or self._is_giving_way or not self._attempt.is_running:
            return
        self._grows_to = nodes
        names = ", ".join(self._hosts[node].name for node in nodes if node not in roster.active)
        self._notice(f"{names} can take part: the ranks save at a common step, and go on with {len(nodes)} hosts")
        for node in roster.active:
            self._crew.say(node, preempt=pb.Preempt())

    async def _grows(self, outcome: Outcome) -> bool:
        """Go on with more hosts, where that is what the ranks have saved for."""
        nodes, self._grows_to = self._grows_to, []
        if not nodes or self.stopped_by is not None:
            return False
        for node in self._roster.active:  # also after a failure: nobody is to save for it any more
            self._crew.say(node, end=pb.End(leave=False, forgets_preemption=not self._is_giving_way))
        await self._wait_swept()
        if self._is_giving_way or outcome.exit_status != EXIT_PREEMPTED:
            return False
        members = self._crew.gang.members
        if all(members[node].here for node in nodes):
            self._roster.grow(nodes)
        step = max(self._attempt.steps.values(), default=None)
        why = f"saved to go on with {self._roster.words()}"
        self._restarts.begin(self._run, Outcome("stopped", EXIT_PREEMPTED, why), step, self._num_ranks)
        self._notice(f"going on with {self._roster.words()}, from the checkpoint of step {step}")
        return True


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
