"""Acts on a running job: Control.Execute towards watchers, a ZeroMQ ROUTER towards the ranks' side threads.

The wire format of the bus is written down in `distui.core.telemetry.control`, its other end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import zmq
import zmq.asyncio

from distui.core.errors import UserError
from distui.daemon.diagnosis import read_ledger
from distui.daemon.registry import KeptRun, Runs
from distui.daemon.state import RunState
from distui.proto import telemetry_pb2 as pb
from distui.proto.telemetry_pb2_grpc import ControlServicer

VERBS = ("stacks", "log-level", "checkpoint", "profile", "stop")
STEP_VERBS = frozenset({"checkpoint", "profile", "stop"})
"""Done by all ranks at the same step: one rank alone would enter a collective and wait for ever."""
DEFAULT_DEADLINE_S = 30.0
SILENT_AFTER_S = 15.0
_GATHER_S = 2.0
_DELIVERY_S = 0.5
_log = logging.getLogger("distui.daemon")


@dataclass(slots=True)
class _Peer:
    identity: bytes
    heard: float


@dataclass(frozen=True, slots=True)
class _Reply:
    rank: int
    state: str
    message: str
    payload: str


class ControlBus:
    """Knows which rank is on which connection, and hands commands and replies over."""

    def __init__(self, socket: Path) -> None:
        """Bind `socket`, open to its user only."""
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket = socket
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[str, tuple[int, asyncio.Queue[_Reply]]] = {}
        self._joined = asyncio.Condition()
        before = os.umask(0o177)
        try:
            self._router.bind(f"ipc://{socket}")
        finally:
            os.umask(before)

    async def serve(self) -> None:
        """Take what the ranks send, for ever."""
        while True:
            frames = await self._router.recv_multipart()
            try:
                await self._receive(frames[0], json.loads(frames[-1]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _log.warning("a message on the control bus cannot be read: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._router.close(0)
        self._context.term()
        self._socket.unlink(missing_ok=True)

    def connected(self, run_id: str, ranks: set[int]) -> set[int]:
        """Return those of the ranks that have been heard lately."""
        oldest = time.monotonic() - SILENT_AFTER_S
        found = {rank for rank in ranks if (run_id, rank) in self._peers}
        return {rank for rank in found if self._peers[run_id, rank].heard >= oldest}

    async def gather(self, run_id: str, ranks: set[int], timeout_s: float) -> set[int]:
        """Wait until all the ranks are connected, or the time is over; return who is."""
        async with self._joined:
            try:
                await asyncio.wait_for(
                    self._joined.wait_for(lambda: self.connected(run_id, ranks) == ranks), max(0.0, timeout_s)
                )
            except asyncio.TimeoutError:
                pass
        return self.connected(run_id, ranks)

    async def send(self, run_id: str, rank: int, verb: str, arguments: dict[str, str], deadline_s: float) -> str:
        """Send a command to one rank and return its id; replies come to the queue given to `expect`."""
        command_id = f"{next(self._ids)}"
        message = {"id": command_id, "verb": verb, "arguments": arguments, "deadline_s": deadline_s}
        await self._router.send_multipart([self._peers[run_id, rank].identity, json.dumps(message).encode()])
        return command_id

    def expect(self, command_id: str, rank: int, replies: asyncio.Queue[_Reply]) -> None:
        """Hand the replies to a command to `replies` from now on."""
        self._waiting[command_id] = (rank, replies)

    def forget(self, command_ids: list[str]) -> None:
        """Drop replies to these commands that come later."""
        for command_id in command_ids:
            self._waiting.pop(command_id, None)

    async def _receive(self, identity: bytes, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "hello":
            self._peers[str(message["run_id"]), int(message["rank"])] = _Peer(identity, time.monotonic())
            async with self._joined:
                self._joined.notify_all()
        elif kind == "bye":
            self._peers = {key: peer for key, peer in self._peers.items() if peer.identity != identity}
        elif kind == "reply" and (found := self._waiting.get(str(message["id"]))) is not None:
            rank, replies = found
            payload = message.get("payload") or ""
            replies.put_nowait(_Reply(rank, str(message["state"]), str(message.get("message") or ""), str(payload)))


class Control(ControlServicer):  # type: ignore[misc]
    """Executes a verb on every rank of a run and streams what they answer."""

    def __init__(self, runs: Runs, bus: ControlBus) -> None:
        self._runs, self._bus = runs, bus

    async def Execute(  # noqa: N802
        self, request: pb.ControlRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ControlReply]:
        """Yield `accepted`, then `done` or `error` for each rank; an `error` for those that do not answer in time."""
        if request.verb not in VERBS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"unknown verb {request.verb!r}; known: {', '.join(VERBS)}"
            )
        try:
            kept = await self._runs.find(request.run_id)
        except UserError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{error}; {error.fix}")
            return
        state = kept.state
        ranks = set(state.ranks) or set(range(state.info.world_size))
        if state.is_final() or not ranks:
            why = f"it has ended: {state.info.state}" if state.is_final() else "no rank of it has spoken yet"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"nothing to act on in {kept.folder.run_id}: {why}"
            )
        deadline = time.monotonic() + (request.deadline_s or DEFAULT_DEADLINE_S)
        gone = {rank for rank in ranks if rank in state.ranks and _is_gone(state, rank)}
        live = ranks - gone
        for rank in sorted(gone):
            yield _error(rank, _why(state, rank))
        there = await self._bus.gather(
            kept.folder.run_id, live, min(_GATHER_S, (deadline - time.monotonic()) / 2 if live else 0.0)
        )
        absent = ranks - there
        if request.verb in STEP_VERBS and absent:
            # A part of the ranks at a common step would wait there for the others for ever.
            missing = ", ".join(f"{rank}: {_why(state, rank)}" for rank in sorted(absent))
            for rank in sorted(live):
                yield _error(
                    rank, f"{request.verb} was sent to nobody, because not all ranks can be reached ({missing})"
                )
            return
        async for reply in self._collect(kept, request, live, deadline):
            yield reply

    async def _collect(
        self, kept: KeptRun, request: pb.ControlRequest, live: set[int], deadline: float
    ) -> AsyncIterator[pb.ControlReply]:
        replies: asyncio.Queue[_Reply] = asyncio.Queue()
        arguments = dict(request.arguments)
        if request.verb in STEP_VERBS:
            arguments["at_step"] = str(target_step(kept.state))
        sent: list[str] = []
        open_ranks = set(live)
        reached: set[int] = set()
        try:
            while open_ranks and (left_s := deadline - time.monotonic()) > 0:
                for rank in sorted(self._bus.connected(kept.folder.run_id, open_ranks - reached)):
                    reached.add(rank)
                    try:
                        command_id = await self._bus.send(kept.folder.run_id, rank, request.verb, arguments, left_s)
                    except zmq.ZMQError as error:
                        open_ranks.discard(rank)
                        yield _error(rank, f"its connection is gone: {error}")
                        continue
                    sent.append(command_id)
                    self._bus.expect(command_id, rank, replies)
                try:
                    # Short turns while a rank is not connected yet: it may come within the deadline.
                    found = await asyncio.wait_for(replies.get(), left_s if open_ranks <= reached else min(left_s, 0.2))
                except asyncio.TimeoutError:
                    continue
                if found.state in ("done", "error"):
                    open_ranks.discard(found.rank)
                yield pb.ControlReply(
                    rank=found.rank, state=found.state, message=found.message, payload=found.payload.encode()
                )
            for rank in sorted(open_ranks):
                yield _error(rank, _why(kept.state, rank))
        finally:
            self._bus.forget(sent)


def target_step(state: RunState) -> int:
    """Return a step that no rank has reached and that all can hear of in time: the newest + 2, more where they fly."""
    newest, step_s = 0, 0.0
    for view in state.ranks.values():
        ledger = read_ledger(state, view)
        newest = max(newest, view.step(), ledger[0].step if ledger is not None else 0)
        step_s = max(step_s, min((step.step_s for step in view.recent), default=0.0))
    return newest + max(2, math.ceil(_DELIVERY_S / step_s) if step_s > 0 else 2)


def _is_gone(state: RunState, rank: int) -> bool:
    view = state.ranks[rank]
    view.probe(time.time())
    return view.finished is not None or not view.alive


def _why(state: RunState, rank: int) -> str:
    view = state.ranks.get(rank)
    if view is None:
        return "it has not spoken yet"
    if _is_gone(state, rank):
        return "the rank has finished" if view.finished is not None else f"the process is dead (pid {view.pid})"
    if view.stopped:
        return f"the process is stopped by a signal; kill -CONT {view.pid} lets it go on"
    return f"no answer from pid {view.pid}"


def _error(rank: int, message: str) -> pb.ControlReply:
    return pb.ControlReply(rank=rank, state="error", message=message)
