"""A daemon that tells what a test gives it: Monitor and Control on a real Unix socket, in the test's own loop."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

FINAL_STATES = frozenset({"finished", "failed", "stopped"})


class FakeDaemon(rpc.MonitorServicer, rpc.ControlServicer):
    """`send` gives watchers an update; a new watcher gets all of them again, as from the daemon."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
        self.socket = self._folder / "d.sock"
        self.updates: list[pb.Update] = []
        self.logs: dict[int, bytes] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.replies: list[pb.ControlReply] = []
        self.refusal = ""
        self.num_watches = 0
        self.num_watching = 0
        self._server: grpc.aio.Server | None = None
        self._more = asyncio.Event()

    async def start(self) -> None:
        """Answer on the socket."""
        self._server = grpc.aio.server()
        rpc.add_MonitorServicer_to_server(self, self._server)
        rpc.add_ControlServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        """Go away, ending every call."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def close(self) -> None:
        """Go away for good."""
        await self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, update: pb.Update) -> None:
        """Tell all watchers, now and later."""
        self.updates.append(update)
        self._more.set()
        self._more = asyncio.Event()

    async def Watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Update]:
        self.num_watches += 1
        self.num_watching += 1
        try:
            number = 0
            while True:
                more = self._more
                while number < len(self.updates):
                    update = self.updates[number]
                    number += 1
                    yield update
                    if update.snapshot.run.state in FINAL_STATES:
                        return
                await more.wait()
        finally:
            self.num_watching -= 1

    async def ReadLog(self, request: pb.ReadLogRequest, context: grpc.aio.ServicerContext) -> pb.ReadLogResponse:
        data = self.logs.get(request.rank)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"rank {request.rank} has no log yet")
            raise AssertionError
        start = request.offset if request.offset >= 0 else max(0, len(data) + request.offset)
        piece = data[start : start + request.max_bytes]
        return pb.ReadLogResponse(data=piece, next_offset=start + len(piece), size=len(data))

    async def Execute(
        self, request: pb.ControlRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ControlReply]:
        self.asked.append((request.verb, dict(request.arguments)))
        if self.refusal:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, self.refusal)
        for reply in self.replies:
            yield reply

    async def GetDaemonInfo(self, request: pb.DaemonInfoRequest, context: grpc.aio.ServicerContext) -> pb.DaemonInfo:
        return pb.DaemonInfo(version="1", pid=1)
