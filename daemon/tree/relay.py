"""What a daemon tells the one above it, and takes from those below: roll-ups up, questions down.

    node daemon ──> relay ──> head        at most `FAN_IN` below each; the supervisor says who is above whom

A daemon with a parent sends each second one message with its own ranks and what has come from below since the last.
Without one it is the head, and keeps what comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count

import grpc

from distui.core.paths import is_run_id
from distui.core.telemetry.endpoint import Endpoint
from distui.daemon.runs.batches import Malformed, check
from distui.daemon.serve.intake import folder_of_another_node
from distui.daemon.serve.live import LiveRuns
from distui.daemon.tree.columns import join
from distui.daemon.tree.leaf import Leaf
from distui.proto import rollup_pb2 as up
from distui.proto import rollup_pb2_grpc as rpc
from distui.proto import telemetry_pb2 as pb

FAN_IN = 32
ROLL_S = 1.0
PASS_S = 0.5
"""What comes from below is passed on so often, that two levels do not make the head's picture too old."""
ASK_S = 3.0
RETRY_S = 1.0
MAX_ROLL_BYTES = 32 << 20
MAX_UNACKED = 600
"""Messages that a parent which is away has not taken; of what is older only the raw telemetry stays, on its node."""
MAX_NAMES = 1 << 16
_log = logging.getLogger("distui.daemon")


@dataclass(slots=True, eq=False)
class _Child:
    """A daemon below."""

    down: asyncio.Queue[up.Down] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Below:
    """What has come of one run from below, and is not sent on yet."""

    rolls: list[up.RollUp] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)


class Clocks:
    """How far the parent's clock is ahead of this one, by the fastest of the last round trips."""

    def __init__(self) -> None:
        self._trips: deque[tuple[float, float]] = deque(maxlen=16)

    def note(self, sent_s: float, there_s: float, back_s: float) -> None:
        """Take in a round trip: sent and come back by this clock, answered by the parent's."""
        self._trips.append((back_s - sent_s, there_s - (sent_s + back_s) / 2))

    @property
    def ahead_s(self) -> float:
        """The parent's clock less this one; 0 before the first round trip."""
        return min(self._trips)[1] if self._trips else 0.0


class Relay(rpc.FederationServicer):
    """Serves daemons below, and sends up where there is a parent. Used on one event loop."""

    def __init__(self, runs: LiveRuns, parent: Endpoint | None = None, name: str = "") -> None:
        """`name` is what the job calls this node."""
        self._runs, self._parent, self._name = runs, parent, name
        self._leaves: dict[str, Leaf] = {}
        self._below: dict[str, _Below] = {}
        self._way: dict[str, _Child] = {}
        """By node: the daemon below through which it is reached."""
        self._asked: dict[int, asyncio.Future[pb.Snapshot]] = {}
        self._answers: dict[str, list[up.Answer]] = {}
        self._ids = count(1)
        self._clocks = Clocks()

    # ---- from below --------------------------------------------------------------------------------------------------

    async def Up(self, rolls: AsyncIterator[up.RollUp], context: grpc.aio.ServicerContext) -> AsyncIterator[up.Down]:
        """Take the roll-ups of one daemon, and send it what is asked of its nodes."""
        child, failed = _Child(), list[str]()

        async def hear() -> None:
            try:
                async for roll in rolls:
                    now_s = time.time()
                    await self._take(roll, child, now_s)
                    child.down.put_nowait(up.Down(number=roll.number, echo_s=roll.sent_s, now_s=time.time()))
            except Malformed as error:
                failed.append(str(error))
            except grpc.RpcError:
                pass  # it is gone: what it was asked for runs into its time limit
            child.down.put_nowait(up.Down())

        hearing = asyncio.create_task(hear())
        try:
            while (down := await child.down.get()) != up.Down():
                yield down
        finally:
            hearing.cancel()
            self._way = {node: other for node, other in self._way.items() if other is not child}
        if failed:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, failed[0])

    async def _take(self, roll: up.RollUp, child: _Child, now_s: float) -> None:
        if not is_run_id(roll.run_id):
            raise Malformed(f"{roll.run_id!r} is no name of a run")
        for node in roll.nodes:
            self._way[node.node] = child
        for answer in roll.answers:
            if (asked := self._asked.get(answer.id)) is not None and not asked.done():
                asked.set_result(answer.snapshot)
        if self._parent is not None:
            below = self._below.setdefault(roll.run_id, _Below())
            if len(below.names) < MAX_NAMES:
                below.names.update(roll.names)
            below.rolls.append(roll)
            if len(below.rolls) > MAX_UNACKED * FAN_IN:
                del below.rolls[0]
            return
        live = await self._runs.open(folder_of_another_node(pb.Batch(run_id=roll.run_id), self._runs))
        live.used_s = time.monotonic()
        if live.state.many is None:
            from distui.daemon.tree.many import Many  # numpy, which only a head needs

            live.state.many = Many()
        live.state.many.take(roll, now_s)
        for batch in roll.batches:
            check(batch, forwarded=True)
            if live.keep(batch):
                await asyncio.to_thread(live.flush)

    # ---- questions ---------------------------------------------------------------------------------------------------

    async def ask(self, run_id: str, node: str) -> pb.Snapshot | None:
        """Return what a node's own daemon knows of a run; None where it does not answer in time."""
        child = self._way.get(node)
        if child is None:
            return None
        number = next(self._ids)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        child.down.put_nowait(up.Down(ask=up.Ask(id=number, run_id=run_id, node=node)))
        try:
            return await asyncio.wait_for(asked, ASK_S)
        except asyncio.TimeoutError:
            return None
        finally:
            del self._asked[number]

    async def _answer(self, ask: up.Ask) -> None:
        """Answer for this node, or have one below answer."""
        leaf = self._leaves.get(ask.run_id)
        found = leaf.snapshot() if leaf is not None and leaf.node == ask.node else await self.ask(ask.run_id, ask.node)
        if found is not None:
            self._answers.setdefault(ask.run_id, []).append(up.Answer(id=ask.id, snapshot=found))
            self._answered.set()

    # ---- up ----------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Send up each second, or, at the head, sum the steps up; until cancelled."""
        if self._parent is None:
            await self._sum_up()
        self._answered = asyncio.Event()
        unacked: deque[up.RollUp] = deque(maxlen=MAX_UNACKED)
        while True:
            try:
                async with self._parent.aio_channel() as channel:  # type: ignore[union-attr]
                    await self._send(rpc.FederationStub(channel), unacked)
            except grpc.aio.AioRpcError as error:
                _log.warning("the daemon above this one: %s", error.details() or error.code().name)
            await asyncio.sleep(RETRY_S)

    async def _sum_up(self) -> None:
        while True:
            await asyncio.sleep(ROLL_S)
            for live in list(self._runs.runs.values()):
                if live.state.many is not None and not live.state.final:
                    live.state.many.sum_up(live, time.time())

    async def _send(self, stub: rpc.FederationStub, unacked: deque[up.RollUp]) -> None:
        """Send on one stream until it ends; what the last one has not had acknowledged comes first."""
        told: set[int] = set()

        async def messages() -> AsyncIterator[up.RollUp]:
            numbers = count(1)
            for late in list(unacked):  # its numbers are of the last stream, its ranks no news
                del late.nodes[:]
                late.ClearField("ranks")
                late.number = next(numbers)
                yield late
            next_s = time.monotonic()
            while True:
                next_s = max(next_s + PASS_S, time.monotonic())
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._answered.wait(), next_s - time.monotonic())
                if self._answered.is_set():
                    self._answered.clear()
                    for run_id in list(self._answers):
                        yield up.RollUp(run_id=run_id, answers=self._answers.pop(run_id))
                    next_s -= PASS_S
                    continue
                for run_id in self._open_runs():
                    roll = await self._roll(run_id, told)
                    if roll is not None:
                        roll.number, roll.sent_s = next(numbers), time.time()
                        if roll.batches:
                            unacked.append(roll)
                        yield roll

        call = stub.Up(messages(), metadata=self._parent.metadata if self._parent is not None else ())
        asking: set[asyncio.Task[None]] = set()
        async for down in call:
            if down.HasField("ask"):
                task = asyncio.create_task(self._answer(down.ask))
                asking.add(task)
                task.add_done_callback(asking.discard)
            elif down.number:
                self._clocks.note(down.echo_s, down.now_s, time.time())
                while unacked and unacked[0].number <= down.number:
                    unacked.popleft()

    def _open_runs(self) -> list[str]:
        for live in self._runs.runs.values():
            if live.num_publishers and live.run.run_id not in self._leaves:
                self._leaves[live.run.run_id] = Leaf(live, self._name)
        return list({**self._leaves, **self._below})

    async def _roll(self, run_id: str, told: set[int]) -> up.RollUp | None:
        """Return this node's part of a run and what has come from below; None where there is nothing."""
        below, leaf = self._below.get(run_id) or _Below(), self._leaves.get(run_id)
        if leaf is not None and time.monotonic() < leaf.rolled_s + ROLL_S - PASS_S / 2:
            leaf = None  # it is not yet time again
        rolls, below.rolls = below.rolls, []
        for roll in rolls:
            for node in roll.nodes:
                node.time_s += self._clocks.ahead_s
                node.skew_s += self._clocks.ahead_s
        if leaf is not None:
            mine = await leaf.roll(self._clocks.ahead_s)
            below.names.update(mine.names)
            rolls.append(mine)
            if leaf.over():
                del self._leaves[run_id]
        if not rolls:
            return None
        newest: dict[str, int] = {node.node: at for at, roll in enumerate(rolls) for node in roll.nodes}
        fresh = [roll for at, roll in enumerate(rolls) if all(newest[node.node] == at for node in roll.nodes)]
        found = up.RollUp(run_id=run_id, names={key: name for key, name in below.names.items() if key not in told})
        told.update(found.names)
        for roll in fresh:
            found.nodes.extend(roll.nodes)
        found.ranks.CopyFrom(join([roll.ranks for roll in fresh if roll.nodes] or [up.RankColumns()]))
        for roll in rolls:
            found.batches.extend(roll.batches)
        return found
