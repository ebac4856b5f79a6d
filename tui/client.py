"""The watcher's side of the daemon: Monitor and Control over its Unix socket, with reconnects.

    Watch ──> Update ──> RunModel          one stream, begun again whenever the daemon comes back
    ReadLog, ListRuns, Execute             single calls, each with a deadline

A daemon that goes away is a state (`away_since_s`), not an error: a dashboard goes on showing what it has.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

# Before the first import of grpc: neither a fork in this process nor a daemon that goes may print over the screen.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from distui.core.errors import DaemonUnavailable
from distui.core.telemetry.endpoint import Endpoint
from distui.core.telemetry.harmless import make_harmless
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

FINAL_STATES = frozenset({"finished", "failed", "stopped"})

_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_RETRY_S = 0.3
_SILENCE_S = 3.0
_CLEANED_AT_ONCE = 128


async def _clean(update: pb.Update) -> None:
    """Make all text in an update harmless: a thousand ranks in turns, so that whoever types is answered between."""
    make_harmless(update, but=("ranks",))
    for number, rank in enumerate(update.snapshot.ranks, start=1):
        make_harmless(rank)
        if number % _CLEANED_AT_ONCE == 0:
            await asyncio.sleep(0)


class Source(Protocol):
    """Where a dashboard has its run from: a daemon, or a recording."""

    away_since_s: float | None
    problem: str

    async def close(self) -> None:
        """Let go of whatever is open."""

    def watch(self, run_id: str, interval_s: float = 0.5, max_points: int = 2000) -> AsyncIterator[pb.Update]:
        """Yield what there is to see."""

    async def read_log(self, run_id: str, rank: int, offset: int, max_bytes: int = 65536) -> pb.ReadLogResponse:
        """Return a piece of a rank's log. Raises: DaemonUnavailable."""

    def execute(
        self, run_id: str, verb: str, arguments: dict[str, str] | None = None, deadline_s: float = 30.0
    ) -> AsyncIterator[pb.ControlReply]:
        """Act on the job and yield the replies. Raises: DaemonUnavailable."""


class MonitorClient:
    """Reads runs from a daemon; use it within one event loop and close it there."""

    def __init__(self, daemon: Path | Endpoint, clock: Callable[[], float] = time.time) -> None:
        """Read from a daemon's socket, or from wherever else one answers."""
        endpoint = Endpoint.unix(daemon) if isinstance(daemon, Path) else daemon
        self._why = endpoint.why
        self._channel = endpoint.aio_channel(_OPTIONS)
        self._metadata = endpoint.metadata
        self._monitor = rpc.MonitorStub(self._channel)
        self._control = rpc.ControlStub(self._channel)
        self._clock = clock
        self.away_since_s: float | None = None
        """Unix time since when the daemon has not answered; None while it does."""
        self.node = ""
        """The host of which all ranks are wanted, where a job has too many to show."""
        self.problem = ""
        """What the daemon last refused, in its words; "" when all is well."""

    async def close(self) -> None:
        """End the channel and every call on it."""
        await self._channel.close(None)

    async def watch(self, run_id: str, interval_s: float = 0.5, max_points: int = 2000) -> AsyncIterator[pb.Update]:
        """Yield the run's updates until it has ended; wait and begin again whenever the daemon goes away.

        After a reconnect the first update holds the whole history again: the reader drops what it knows.
        """
        request = pb.WatchRequest(run_id=run_id, interval_s=interval_s, max_points=max_points)
        while True:
            request.node = self.node
            call = self._monitor.Watch(request, wait_for_ready=self.away_since_s is not None, metadata=self._metadata)
            try:
                async for update in self._updates(call):
                    self.away_since_s, self.problem = None, ""
                    yield update
                    if update.snapshot.run.state in FINAL_STATES:
                        return
                    if self.node != request.node:
                        break
                else:
                    self._lost("the daemon ended the stream")
            except grpc.aio.AioRpcError as error:
                self._lost(self._told(error), error.code() is grpc.StatusCode.NOT_FOUND)
            finally:
                call.cancel()
            if self.node != request.node:
                request.max_points = 1  # what came before is known
                continue
            await asyncio.sleep(_RETRY_S)

    async def _updates(self, call: grpc.aio.UnaryStreamCall) -> AsyncIterator[pb.Update]:
        """Yield what the stream brings; a silent stream is probed, so that a stopped daemon is noticed."""
        while True:
            reading = asyncio.ensure_future(call.read())
            try:
                while not (await asyncio.wait({reading}, timeout=_SILENCE_S))[0]:
                    await self._probe()
            finally:
                if not reading.done():
                    reading.cancel()
            update = reading.result()
            if not isinstance(update, pb.Update):  # the end of the stream
                return
            await _clean(update)
            yield update

    async def _probe(self) -> None:
        try:
            await self._monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=2.0, metadata=self._metadata)
            self.away_since_s = None
        except grpc.aio.AioRpcError as error:
            self._lost(self._told(error))

    def _told(self, error: grpc.aio.AioRpcError) -> str:
        return self._why(error.details() or error.code().name)

    def _lost(self, problem: str, answered: bool = False) -> None:
        self.problem = problem
        if answered:
            self.away_since_s = None
        elif self.away_since_s is None:
            self.away_since_s = self._clock()

    async def list_runs(self, limit: int = 0) -> list[pb.RunInfo]:
        """Return the runs the daemon knows, newest first. Raises: DaemonUnavailable."""
        request = pb.ListRunsRequest(limit=limit)
        try:
            response = await self._monitor.ListRuns(request, timeout=5.0, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise DaemonUnavailable(self._told(error)) from error
        make_harmless(response)
        return list(response.runs)

    async def read_log(self, run_id: str, rank: int, offset: int, max_bytes: int = 65536) -> pb.ReadLogResponse:
        """Return a piece of a rank's log from `offset`, or from the end where it is negative.

        Units: bytes. Raises: DaemonUnavailable, with the daemon's own words where it answered.
        """
        request = pb.ReadLogRequest(run_id=run_id, rank=rank, offset=offset, max_bytes=max_bytes)
        try:
            response: pb.ReadLogResponse = await self._monitor.ReadLog(request, timeout=5.0, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise DaemonUnavailable(self._told(error)) from error
        return response

    async def execute(
        self, run_id: str, verb: str, arguments: dict[str, str] | None = None, deadline_s: float = 30.0
    ) -> AsyncIterator[pb.ControlReply]:
        """Act on the job and yield the replies as ranks give them. Raises: DaemonUnavailable."""
        request = pb.ControlRequest(run_id=run_id, verb=verb, arguments=arguments or {}, deadline_s=deadline_s)
        try:
            async for reply in self._control.Execute(request, timeout=deadline_s + 5.0, metadata=self._metadata):
                make_harmless(reply)
                yield reply
        except grpc.aio.AioRpcError as error:
            raise DaemonUnavailable(self._told(error)) from error
