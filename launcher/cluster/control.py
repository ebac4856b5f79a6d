"""The port that agents dial: TLS by a certificate of this job, a token for each agent that is good for one Join."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from distui.core.errors import UserError
from distui.daemon.node.processes import raise_file_limit
from distui.daemon.serve.security import caller_options
from distui.launcher.cluster.certificate import new_certificate
from distui.launcher.node.facts import Hello
from distui.launcher.node.link import OPTIONS, PIECE_BYTES
from distui.proto import cluster_pb2 as pb
from distui.proto import cluster_pb2_grpc as rpc

HELLO_S = 10.0
MAX_HOSTS, MAX_TUNNELS = 1 << 14, 1 << 12
"""More than any job has, of whom one port can be called, and of what one of them can ask."""
MAX_HELLO_BYTES = 1 << 20


class Seat:
    """The place of one agent: its token, whether it has come, and what is to be said to it."""

    def __init__(self, node: int) -> None:
        self.node, self.token = node, secrets.token_urlsafe(32)
        self.is_taken = self.is_closed = False
        self.saying: asyncio.Queue[pb.SupervisorSays | None] = asyncio.Queue()

    def say(self, **body: Any) -> None:
        """Send a message to the agent."""
        self.saying.put_nowait(pb.SupervisorSays(**body))

    def close(self) -> None:
        """Let nobody in any more by this token."""
        self.is_taken = self.is_closed = True
        self.saying.put_nowait(None)


class ControlPort(rpc.ClusterServicer):
    """Serves agents. `on_hello(seat, hello)`, `on_said(seat, message)` and `on_gone(seat)` hear of them."""

    def __init__(
        self,
        on_hello: Callable[[Seat, Hello], None],
        on_said: Callable[[Seat, pb.AgentSays], None],
        on_gone: Callable[[Seat], None],
        sockets: Callable[[], dict[str, Path]],
    ) -> None:
        """`sockets` gives the daemon's, by the names that tunnels ask for."""
        self._on_hello, self._on_said, self._on_gone, self._sockets = on_hello, on_said, on_gone, sockets
        self._seats: list[Seat] = []
        self.certificate, self._key = new_certificate()
        raise_file_limit()
        self._server = grpc.aio.server(
            options=[*OPTIONS, ("grpc.so_reuseport", 0), *caller_options(MAX_HOSTS, MAX_TUNNELS)]
        )
        rpc.add_ClusterServicer_to_server(self, self._server)

    async def start(self, addresses: Sequence[str]) -> dict[str, int]:
        """Listen on these addresses of this machine; return the port of each. Raises: UserError."""
        credentials = grpc.ssl_server_credentials([(self._key, self.certificate)])
        ports = {}
        for address in addresses:
            name = f"[{address}]" if ":" in address else address
            try:
                ports[address] = self._server.add_secure_port(f"{name}:0", credentials)
            except RuntimeError as error:
                why, fix = str(error), "name the interface that hosts reach this one by: --set cluster.interface=..."
                raise UserError(f"no port can be opened on {address}", why, fix) from error
        await self._server.start()
        return ports

    async def stop(self) -> None:
        """Hang up on everybody."""
        await self._server.stop(0.2)

    def seat(self, node: int) -> Seat:
        """Return a new place for the agent of a node, whose earlier ones are closed."""
        for earlier in self._seats:
            if earlier.node == node:
                earlier.close()
        seat = Seat(node)
        self._seats = [one for one in self._seats if one.node != node] + [seat]
        return seat

    async def _seat_of(self, context: grpc.aio.ServicerContext) -> Seat:
        brought = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        for seat in self._seats:
            if hmac.compare_digest(brought.encode(), f"Bearer {seat.token}".encode()) and not seat.is_closed:
                return seat
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not one of this job")
        raise AssertionError("abort raises")

    async def Join(
        self, said: AsyncIterator[pb.AgentSays], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SupervisorSays]:
        """Serve one agent until it, or its seat, is gone."""
        seat = await self._seat_of(context)
        if seat.is_taken:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "an agent has come with this token already")
        seat.is_taken = True
        try:
            first = await asyncio.wait_for(anext_of(said), HELLO_S)
            if len(first.hello) > MAX_HELLO_BYTES:
                raise ValueError("it is too long")
            hello = Hello.of(json.loads(first.hello))
        except (asyncio.TimeoutError, StopAsyncIteration, ValueError, TypeError, KeyError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no hello came: {type(error).__name__}: {error}")
        self._on_hello(seat, hello)
        hearing = asyncio.create_task(self._hear(seat, said))
        try:
            while (message := await seat.saying.get()) is not None:
                yield message
        finally:
            hearing.cancel()
            seat.is_closed = True
            self._on_gone(seat)

    async def _hear(self, seat: Seat, said: AsyncIterator[pb.AgentSays]) -> None:
        with suppress(grpc.aio.AioRpcError, grpc.RpcError, asyncio.CancelledError):
            async for message in said:
                if message.WhichOneof("body") == "beat":
                    seat.say(beat=message.beat)
                self._on_said(seat, message)
        seat.saying.put_nowait(None)

    async def Tunnel(
        self, pieces: AsyncIterator[pb.Piece], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Piece]:
        """Carry one connection of a rank to a socket of the daemon here."""
        await self._seat_of(context)
        path = self._sockets().get(str(dict(context.invocation_metadata() or ()).get("socket", "")))
        if path is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such socket")
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no daemon: {error}")

        async def inward() -> None:
            with suppress(grpc.RpcError, OSError, asyncio.CancelledError):
                async for piece in pieces:
                    writer.write(piece.data)
                    await writer.drain()
                if writer.can_write_eof():
                    writer.write_eof()

        carrying = asyncio.create_task(inward())
        try:
            while data := await reader.read(PIECE_BYTES):
                yield pb.Piece(data=data)
        except OSError:
            pass  # the daemon has ended: the rank sees its connection end
        finally:
            carrying.cancel()
            writer.close()


async def anext_of(stream: AsyncIterator[pb.AgentSays]) -> pb.AgentSays:
    """Return the next message; `anext` of Python 3.10 is no coroutine that can be waited for with a limit."""
    return await stream.__anext__()
