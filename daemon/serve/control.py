"""Acting on running jobs: the control bus to the ranks of this node, and the Control service in front of it.

The wire format of the bus is in `distui.core.telemetry.control`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import tomlkit
import zmq
import zmq.asyncio

from distui.core.paths import RunFolder
from distui.core.telemetry.control import DEFAULT_DEADLINE_S, HELLO_S
from distui.core.telemetry.stacks import known_stack, traced
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, Observed, observe, this_node
from distui.daemon.runs.folders import FINAL_STATES
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.daemon.serve.monitor import found
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

VERBS = ("checkpoint", "log-level", "profile", "stacks", "stop")
READ_ONLY = frozenset({"stacks"})
"""What changes nothing in the job."""
AT_STEP = frozenset({"checkpoint", "profile", "stop"})
"""What all ranks must do at the same step: one alone would enter a collective and cause the hang itself."""
AHEAD_STEPS = 2
AHEAD_S = 0.2
"""Time that a command takes to reach the last rank, in steps on top of `AHEAD_STEPS` where they are short."""
WEDGED_S = 3.0
"""A rank whose side thread has not noted its stack for so long has nobody to answer."""
GREET_S = 10.0
"""A rank that runs but has not greeted (it or the daemon has just started) is waited for so long."""

_log = logging.getLogger("distui.daemon")


@dataclass(slots=True)
class _Peer:
    identity: bytes
    pid: int
    heard_s: float


class ControlBus:
    """The ROUTER that the ranks' side threads connect to. Used on one event loop."""

    def __init__(self, socket: Path) -> None:
        """Bind `socket`, mode 0600 under the process's umask. Raises: zmq.ZMQError."""
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(f"ipc://{socket}")
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._answers: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._greeted = asyncio.Event()

    async def serve(self) -> None:
        """Hear the ranks until cancelled."""
        while True:
            identity, *frames = await self._router.recv_multipart()
            try:
                message = json.loads(frames[0])
                self._hear(identity, message)
            except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                _log.warning("a message on the control bus cannot be read: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        """Close the socket."""
        self._router.close()
        self._context.term()

    def _hear(self, identity: bytes, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "hello":
            peer = _Peer(identity, int(message["pid"]), time.monotonic())
            self._peers[str(message["run_id"]), int(message["rank"])] = peer
            self._greeted.set()
            self._greeted = asyncio.Event()
        elif kind == "reply":
            if (answers := self._answers.get(str(message["id"]))) is not None:
                answers.put_nowait(message)
        elif kind == "bye":
            for key in [key for key, peer in self._peers.items() if peer.identity == identity]:
                del self._peers[key]

    def present(self, run_id: str, rank: int) -> bool:
        """Tell whether a rank listens."""
        peer = self._peers.get((run_id, rank))
        if peer is not None and time.monotonic() - peer.heard_s > 3 * HELLO_S:
            del self._peers[run_id, rank]
            return False
        return peer is not None

    async def wait_present(self, run_id: str, ranks: list[int], timeout_s: float) -> None:
        """Wait until these ranks listen, `timeout_s` at most."""
        deadline = time.monotonic() + timeout_s
        while not all(self.present(run_id, rank) for rank in ranks) and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._greeted.wait(), left)
            except asyncio.TimeoutError:
                return

    async def ask(
        self, run_id: str, rank: int, verb: str, arguments: dict[str, str], deadline_s: float
    ) -> AsyncIterator[pb.ControlReply]:
        """Have one rank do `verb` and yield what it answers; an error where it does not in time."""
        id_ = str(next(self._ids))
        answers = self._answers[id_] = asyncio.Queue()
        deadline = time.monotonic() + deadline_s
        command = {"id": id_, "verb": verb, "arguments": arguments, "deadline_s": deadline_s}
        peer = self._peers[run_id, rank]
        try:
            with _at_end_of(peer.pid, lambda: answers.put_nowait({})):
                await self._router.send_multipart([peer.identity, json.dumps(command).encode()])
                while answer := await asyncio.wait_for(answers.get(), max(0.0, deadline - time.monotonic())):
                    yield pb.ControlReply(
                        rank=rank,
                        state=str(answer.get("state")),
                        message=str(answer.get("message") or ""),
                        payload=str(answer.get("payload") or "").encode(),
                    )
                    if answer.get("state") != "accepted":
                        return
            yield _error(rank, f"rank {rank} (pid {peer.pid}) ended before it answered")
        except asyncio.TimeoutError:
            yield _error(rank, f"rank {rank} did not answer within {deadline_s:g} s")
        finally:
            del self._answers[id_]


class Control(rpc.ControlServicer):
    """Serves Execute."""

    def __init__(self, runs: LiveRuns, bus: ControlBus, on_use: Callable[[], None]) -> None:
        """Find runs in `runs` and reach their ranks over `bus`; `on_use` is called whenever somebody asks."""
        self._runs, self._bus, self._on_use = runs, bus, on_use

    async def Execute(
        self, request: pb.ControlRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ControlReply]:
        """Yield every rank's answers as they come; each rank's last is `done` or `error`."""
        self._on_use()
        live = await found(self._runs.find(request.run_id), context)
        if request.verb not in VERBS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"unknown verb {request.verb!r}; known: {', '.join(VERBS)}"
            )
        if request.verb not in READ_ONLY and read_only(live.state.info.config_toml):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{live.run.run_id} is read-only: its [telemetry] says control = false, so {request.verb} is refused; "
                f"{' and '.join(sorted(READ_ONLY))} still work. Launch with --set telemetry.control=true to allow it",
            )
        state = live.snapshot().run.state
        if state in FINAL_STATES:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{live.run.run_id} has ended: it is {state}")
        deadline_s = request.deadline_s if request.deadline_s > 0 else DEFAULT_DEADLINE_S
        deadline = time.monotonic() + deadline_s
        ranks = {rank.rank: rank for rank in observe(live.state, time.time())}
        alive = [
            number
            for number, rank in ranks.items()
            if rank.process not in (DEAD, FINISHED) and not _cannot_answer(live, rank)
        ]
        await self._bus.wait_present(live.run.run_id, alive, min(GREET_S, deadline_s))
        arguments = dict(request.arguments)
        if request.verb in AT_STEP:
            arguments.setdefault("at_step", str(agreed_step(live)))
        replies: asyncio.Queue[pb.ControlReply | None] = asyncio.Queue()

        async def one(rank: int) -> None:
            known = ranks.get(rank)
            if request.verb == "stacks" and known is not None and _cannot_answer(live, known):
                replies.put_nowait(await asyncio.to_thread(stacks_from_outside, live.run, known))
            elif self._bus.present(live.run.run_id, rank):
                left_s = max(0.0, deadline - time.monotonic())
                async for reply in self._bus.ask(live.run.run_id, rank, request.verb, arguments, left_s):
                    replies.put_nowait(reply)
            else:
                replies.put_nowait(_error(rank, _why_absent(rank, ranks.get(rank))))
            replies.put_nowait(None)

        tasks = [asyncio.create_task(one(rank)) for rank in range(live.state.world_size())]
        live.num_watchers += 1
        try:
            left = len(tasks)
            while left:
                reply = await replies.get()
                if reply is None:
                    left -= 1
                else:
                    yield reply
        finally:
            live.num_watchers -= 1
            for task in tasks:
                task.cancel()


@contextlib.contextmanager
def _at_end_of(pid: int, then: Callable[[], None]) -> Iterator[None]:
    """Within, call `then` on the running loop once when process `pid` ends, where the system can tell."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux; or gone already, which the deadline tells
        yield
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(fd)
        then()

    loop.add_reader(fd, ended)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def read_only(config_toml: str) -> bool:
    """Tell whether a run's own configuration forbids to act on it."""
    if not config_toml:
        return False
    section = tomlkit.parse(config_toml).unwrap().get("telemetry", {})
    return section.get("control") is False


def _cannot_answer(live: LiveRun, rank: Observed) -> bool:
    """Tell whether no thread of the rank can run: its process is stopped, or something holds the interpreter's lock."""
    if rank.node != this_node() or rank.process in (DEAD, FINISHED):
        return False
    known = known_stack(live.run, rank.rank)
    return rank.process == STOPPED or (known is not None and time.time() - known.time_s > WEDGED_S)


def stacks_from_outside(run: RunFolder, rank: Observed) -> pb.ControlReply:
    """Return the stacks of a rank that cannot answer: from its signal handler, or where it was seen last."""
    known = known_stack(run, rank.rank)
    text = traced(run, rank.rank, rank.pid) if rank.process != STOPPED else ""
    if text:
        why = "something holds the interpreter's lock (GIL): this is from a signal handler, innermost frame first"
    elif known is not None:
        why = f"the process is {rank.process}: this is where its main thread was {time.time() - known.time_s:.0f} s ago"
        text = "\n".join(known.frames)
    else:
        return _error(rank.rank, f"rank {rank.rank} (pid {rank.pid}) is {rank.process}, and its stack was never noted")
    return pb.ControlReply(rank=rank.rank, state="done", message=why, payload=text.encode())


def agreed_step(live: LiveRun) -> int:
    """Return a step that no rank has reached yet, nor will before the command has arrived everywhere."""
    newest = max((rank.step for rank in observe(live.state, time.time())), default=0)
    last = live.state.steps.history.last()
    step_s = last.step_s if last is not None else 0.0
    return newest + AHEAD_STEPS + (int(AHEAD_S / step_s) if step_s > 0 else 0)


def _why_absent(rank: int, known: Observed | None) -> str:
    if known is None:
        return f"rank {rank} was never heard of"
    if known.process == DEAD:
        return f"rank {rank} is dead (pid {known.pid} on {known.node})"
    if known.process == FINISHED:
        return f"rank {rank} has finished"
    return f"rank {rank} (pid {known.pid} on {known.node}, {known.process}) is not on this node's control bus"


def _error(rank: int, message: str) -> pb.ControlReply:
    return pb.ControlReply(rank=rank, state="error", message=message)
