"""An agent's connection to its supervisor: what both say, the beats between them, and the ranks' way to the daemon."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc loads: this process starts others
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from distui.proto import cluster_pb2 as pb
from distui.proto import cluster_pb2_grpc as rpc

BEAT_S = 1.0
DEAD_S = 12.0
"""Who has not answered for so long is dead: the agent ends its ranks, as the supervisor ends the other hosts'."""
CONNECT_S = 8.0
"""A connection that is not there by then is told; a firewall that drops packets says nothing by itself."""
PIECE_BYTES = 1 << 16
SERVER_NAME = "distui-supervisor"
"""What the certificate of each supervisor names: agents know it by the certificate itself."""
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # hosts of a job are not beyond a proxy, whatever the environment says
    ("grpc.max_receive_message_length", 16 << 20),
]


class Link(threading.Thread):
    """A thread with the connection. `on_said` hears what the supervisor says, `on_lost` why it is gone; both there."""

    def __init__(
        self,
        address: str,
        certificate: bytes,
        token: str,
        hello: Callable[[], str],
        on_said: Callable[[pb.SupervisorSays], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """`hello` is called once connected; `token` lets this agent in, once."""
        super().__init__(name="link", daemon=True)
        self._address, self._certificate, self._hello = address, certificate, hello
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._on_said, self._on_lost = on_said, on_lost
        self._loop = asyncio.new_event_loop()
        self._saying: asyncio.Queue[pb.AgentSays | None] = asyncio.Queue()
        self._heard_s = time.monotonic()
        self._left = threading.Event()

    def say(self, message: pb.AgentSays | None) -> None:
        """Send a message after those before it; None ends the stream. From any thread."""
        self._loop.call_soon_threadsafe(self._saying.put_nowait, message)

    def leave(self, timeout_s: float) -> None:
        """End the stream once all has been sent, and wait for that."""
        self.say(None)
        self._left.wait(timeout_s)

    def serve_sockets(self, folder: Path) -> None:
        """Have the sockets of `folder` lead to the daemon of the head. From any thread."""
        asyncio.run_coroutine_threadsafe(self._serve_sockets(folder), self._loop).result(10.0)

    def run(self) -> None:
        """Connect, and serve until the stream has ended."""
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        credentials = grpc.ssl_channel_credentials(self._certificate)
        options = [*OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
        async with grpc.aio.secure_channel(self._address, credentials, options=options) as channel:
            self._stub = rpc.ClusterStub(channel)
            try:
                await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
            except asyncio.TimeoutError:
                print(f"distui: unreachable {self._address}", flush=True)
                await channel.channel_ready()
            self._heard_s = time.monotonic()
            why = "the supervisor has ended"
            beats = asyncio.create_task(self._beat())
            try:
                call = self._stub.Join(self._all_said(), metadata=self._metadata)
                async for said in call:
                    self._heard_s = time.monotonic()
                    if said.WhichOneof("body") != "beat":
                        self._on_said(said)
            except grpc.aio.AioRpcError as error:
                why = f"the supervisor is gone: {error.details() or error.code().name}"
            finally:
                beats.cancel()
        if not self._left.is_set():
            self._on_lost(why)

    async def _all_said(self) -> AsyncIterator[pb.AgentSays]:
        yield pb.AgentSays(hello=self._hello())
        while (message := await self._saying.get()) is not None:
            yield message
        self._left.set()

    async def _beat(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(BEAT_S)
            number += 1
            self._saying.put_nowait(pb.AgentSays(beat=pb.Beat(number=number)))
            if (silent_s := time.monotonic() - self._heard_s) > DEAD_S:
                self._on_lost(f"the supervisor has not answered for {silent_s:.0f} s")
                return

    # ---- the ranks' way to the daemon --------------------------------------------------------------------------------

    async def _serve_sockets(self, folder: Path) -> None:
        for name in ("daemon", "control"):
            path = folder / f"{name}.sock"

            async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                await self._tunnel(name, reader, writer)

            await asyncio.start_unix_server(tunnel, path)
            os.chmod(path, 0o600)

    async def _tunnel(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, until either end closes it."""

        async def outgoing() -> AsyncIterator[pb.Piece]:
            while data := await reader.read(PIECE_BYTES):
                yield pb.Piece(data=data)

        try:
            call = self._stub.Tunnel(outgoing(), metadata=(*self._metadata, ("socket", name)))
            async for piece in call:
                writer.write(piece.data)
                await writer.drain()
        except (grpc.aio.AioRpcError, OSError, asyncio.CancelledError):  # cancelled: the whole link is closing
            pass  # the rank sees its connection end, and tries again
        finally:
            writer.close()
