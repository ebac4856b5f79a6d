"""Who may join: an agent with the token of its seat, once; nobody else, and nothing twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from distui.daemon.serve import security
from distui.launcher.cluster.certificate import new_certificate
from distui.launcher.cluster.control import ControlPort, Seat
from distui.launcher.node.facts import Hello
from distui.launcher.node.link import SERVER_NAME
from distui.proto import cluster_pb2 as pb
from distui.proto import cluster_pb2_grpc as rpc
from tests.cluster.test_hello import HERE


class Heard:
    """What a control port has told of, and clients of it."""

    def __init__(self, sockets: dict[str, Path] | None = None) -> None:
        self.hellos: list[tuple[int, str]] = []
        self.said: list[str] = []
        self.gone: list[int] = []
        self.changed = asyncio.Event()
        self.port = ControlPort(self._hello, self._said, self._gone, lambda: sockets or {})
        self.address = ""

    async def start(self) -> None:
        (number,) = (await self.port.start(["127.0.0.1"])).values()
        self.address = f"127.0.0.1:{number}"

    def _hello(self, seat: Seat, hello: Hello) -> None:
        self.hellos.append((seat.node, hello.host_name))
        self.changed.set()

    def _said(self, seat: Seat, message: pb.AgentSays) -> None:
        self.said.append(str(message.WhichOneof("body")))

    def _gone(self, seat: Seat) -> None:
        self.gone.append(seat.node)
        self.changed.set()

    async def until_changed(self) -> None:
        await asyncio.wait_for(self.changed.wait(), 30.0)
        self.changed.clear()

    def channel(self, certificate: bytes | None = None) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(certificate or self.port.certificate)
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        return grpc.aio.secure_channel(self.address, credentials, options=options)


async def saying(*messages: pb.AgentSays, then: asyncio.Event | None = None) -> AsyncIterator[pb.AgentSays]:
    """Say the messages, and stay until `then`; None is for ever: who speaks as it is refused may not hear why."""
    for message in messages:
        yield message
    await (then or asyncio.Event()).wait()


def hello() -> pb.AgentSays:
    return pb.AgentSays(hello=json.dumps(HERE.to_json()))


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_an_agent_joins_once_and_its_beats_come_back() -> None:
    heard, leave = Heard(), asyncio.Event()
    await heard.start()
    seat = heard.port.seat(1)
    async with heard.channel() as channel:
        stub = rpc.ClusterStub(channel)
        beat = pb.AgentSays(beat=pb.Beat(number=7))
        call = stub.Join(saying(hello(), beat, then=leave), metadata=bearer(seat.token))
        assert (await call.read()).beat.number == 7
        assert heard.hellos == [(1, "head")] and heard.said == ["beat"]
        seat.say(end=pb.End(leave=True))
        assert (await call.read()).end.leave
        replayed = stub.Join(saying(), metadata=bearer(seat.token))
        assert await refused(replayed) == grpc.StatusCode.PERMISSION_DENIED, "a hello that is said again"
        heard.changed.clear()
        leave.set()
        await heard.until_changed()
        assert heard.gone == [1]
        again = stub.Join(saying(), metadata=bearer(seat.token))
        assert await refused(again) == grpc.StatusCode.UNAUTHENTICATED, "the seat is closed with its agent"
    await heard.port.stop()


async def test_strangers_are_refused() -> None:
    heard = Heard()
    await heard.start()
    seat = heard.port.seat(0)
    async with heard.channel() as channel:
        stub = rpc.ClusterStub(channel)
        for metadata in ((), bearer("wrong"), (("authorization", seat.token),)):
            assert await refused(stub.Join(saying(), metadata=metadata)) == grpc.StatusCode.UNAUTHENTICATED
            assert await refused(stub.Tunnel(saying_nothing(), metadata=metadata)) == grpc.StatusCode.UNAUTHENTICATED
        bad = pb.AgentSays(hello='{"host_name": 1}')
        assert await refused(stub.Join(saying(bad), metadata=bearer(seat.token))) == grpc.StatusCode.INVALID_ARGUMENT
        newer = heard.port.seat(0)
        assert newer.token != seat.token
        late = stub.Join(saying(), metadata=bearer(seat.token))
        assert await refused(late) == grpc.StatusCode.UNAUTHENTICATED, "the agent before the one that is expected"
    other, _ = new_certificate()
    async with heard.channel(other) as channel:
        call = rpc.ClusterStub(channel).Join(saying(), metadata=bearer(newer.token))
        assert await refused(call) == grpc.StatusCode.UNAVAILABLE, "a supervisor with another certificate"
    assert not heard.hellos
    await heard.port.stop()


async def test_who_connects_and_is_silent_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "HANDSHAKE_MS", 300)
    heard = Heard()
    await heard.start()
    host, _, port = heard.address.partition(":")
    callers = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    for reader, writer in callers:
        assert await asyncio.wait_for(reader.read(), 30.0) == b""
        writer.close()
    seat = heard.port.seat(0)
    async with heard.channel() as channel:
        call = rpc.ClusterStub(channel).Join(saying(hello()), metadata=bearer(seat.token))
        await heard.until_changed()
        call.cancel()
    await heard.port.stop()


async def saying_nothing() -> AsyncIterator[pb.Piece]:
    await asyncio.Event().wait()
    yield pb.Piece()


async def test_a_tunnel_leads_to_the_daemons_socket_and_to_no_other(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data.upper())
        writer.close()

    server = await asyncio.start_unix_server(echo, tmp_path / "d.sock")
    heard = Heard({"daemon": tmp_path / "d.sock", "control": tmp_path / "none.sock"})
    await heard.start()
    metadata = bearer(heard.port.seat(0).token)

    async def pieces() -> AsyncIterator[pb.Piece]:
        yield pb.Piece(data=b"one ")
        yield pb.Piece(data=b"two")

    async with heard.channel() as channel:
        stub = rpc.ClusterStub(channel)
        got = [piece.data async for piece in stub.Tunnel(pieces(), metadata=(*metadata, ("socket", "daemon")))]
        assert b"".join(got) == b"ONE TWO"
        for name, code in (("control", grpc.StatusCode.UNAVAILABLE), ("../x", grpc.StatusCode.INVALID_ARGUMENT)):
            assert await refused(stub.Tunnel(saying_nothing(), metadata=(*metadata, ("socket", name)))) == code
    await heard.port.stop()
    server.close()
    await server.wait_closed()
