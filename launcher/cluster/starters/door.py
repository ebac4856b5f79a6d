"""Hosts that call: a starter for places into which nothing can log in, but which run a command of ours from the start.

    host: python -m distui.launcher.node.caller ──TLS, token──> the starter's port ──> the agent, started there

What an ssh session is elsewhere is here a connection that the host opens (a pod, an actor). Its command is started, its
three streams are carried, and the end of the connection is the end of its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import ssl
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distui.launcher.cluster.certificate import new_certificate
from distui.launcher.cluster.hosts import Host
from distui.launcher.node.caller import FRAME, MAX_FRAME_BYTES

HELLO_S = 10.0


class Called:
    """A command on a host that has called: as much of `asyncio.subprocess.Process` as the crew needs."""

    def __init__(self) -> None:
        self.stdin, self.stdout, self.stderr = _Stdin(self), asyncio.StreamReader(), asyncio.StreamReader()
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._early = bytearray()
        self._is_closed = False

    async def attach(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: Sequence[str]) -> None:
        """Have the command started at the other end, and carry its streams until it, or the connection, ends."""
        self._writer = writer
        _send(writer, b"c", json.dumps(list(command)).encode())
        if self._early:
            _send(writer, b"i", bytes(self._early))
        if self._is_closed:
            _send(writer, b"z", b"")
        status = 255
        try:
            while True:
                kind, data = await receive(reader)
                if kind == b"o":
                    self.stdout.feed_data(data)
                elif kind == b"e":
                    self.stderr.feed_data(data)
                elif kind == b"x":
                    status = struct.unpack("!i", data)[0]
                    break
        except (asyncio.IncompleteReadError, OSError, ValueError):
            self.stderr.feed_data(b"the host has hung up\n")
        finally:
            self._writer = None
            self.end(status)

    def end(self, status: int) -> None:
        """Note how the command has ended."""
        if self.returncode is None:
            self.returncode = status
            self.stdout.feed_eof()
            self.stderr.feed_eof()
            self._ended.set()

    def write(self, kind: bytes, data: bytes) -> None:
        """Send towards the command; before its host has called it is kept."""
        if self._writer is not None:
            _send(self._writer, kind, data)
        elif kind == b"i":
            self._early += data
        elif kind == b"z":
            self._is_closed = True

    async def drain(self) -> None:
        """Wait until what was written has left."""
        if self._writer is not None:
            await self._writer.drain()

    async def wait(self) -> int:
        """Return the exit status once there is one."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    async def communicate(self, data: bytes) -> tuple[bytes, bytes]:
        """Give the command all of its stdin, and return what it says."""
        self.stdin.write(data)
        self.stdin.close()
        out, err = await asyncio.gather(self.stdout.read(), self.stderr.read())
        await self.wait()
        return out, err

    def kill(self) -> None:
        """End the command."""
        self.write(b"k", b"")
        if self._writer is None:
            self.end(-9)


class _Stdin:
    def __init__(self, called: Called) -> None:
        self._called = called

    def write(self, data: bytes) -> None:
        """Send to the command's stdin."""
        self._called.write(b"i", data)

    async def drain(self) -> None:
        """Wait until what was written has left."""
        await self._called.drain()

    def close(self) -> None:
        """End the command's stdin."""
        self._called.write(b"z", b"")


class Door:
    """The port that hosts call, each by its name and the token of the job; each call takes one command."""

    def __init__(self, token: str = "", pair: tuple[bytes, bytes] | None = None) -> None:
        """Take calls with `token`, under a certificate and its key; what is not given is made."""
        self._token = token or secrets.token_urlsafe(32)
        self._certificate, self._key = pair or new_certificate()
        self._waiting: dict[str, asyncio.Queue[tuple[Called, Sequence[str]]]] = {}
        self._calls: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def secrets(self) -> tuple[bytes, bytes]:
        """The token and certificate that a host needs to call."""
        return self._token.encode(), self._certificate

    async def open(self, address: str, port: int) -> int:
        """Listen; return the port."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory(prefix="distui-") as folder:
            files = [Path(folder) / name for name in ("cert.pem", "key.pem")]
            for file, data in zip(files, (self._certificate, self._key), strict=True):
                file.touch(0o600)
                file.write_bytes(data)
            context.load_cert_chain(files[0], files[1])
        self._server = await asyncio.start_server(self._called, address, port, ssl=context)
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    def start(self, host: Host, command: Sequence[str]) -> Called:
        """Return the command that the host will run once it calls."""
        called = Called()
        self._waiting.setdefault(host.name, asyncio.Queue()).put_nowait((called, command))
        return called

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._calls.add(writer)
        try:
            kind, data = await asyncio.wait_for(receive(reader), HELLO_S)
            said = json.loads(data) if kind == b"h" else {}
            if not hmac.compare_digest(str(said.get("token", "")).encode(), self._token.encode()):
                return
            queue = self._waiting.setdefault(str(said.get("name", "")), asyncio.Queue())
            while True:
                called, command = await queue.get()
                if called.returncode is None:  # else it was given up before the host called
                    await called.attach(reader, writer, command)
                    return
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError, ValueError):
            pass  # a stranger, or a host that is gone: its next call is another
        finally:
            self._calls.discard(writer)
            writer.close()

    async def close(self, status: int) -> None:
        """Have every host that calls, or is waiting, end with `status`."""
        for writer in list(self._calls):
            with contextlib.suppress(OSError):
                _send(writer, b"l", struct.pack("!i", status))
                await writer.drain()
        if self._server is not None:
            self._server.close()


def _send(writer: asyncio.StreamWriter, kind: bytes, data: bytes) -> None:
    writer.write(FRAME.pack(kind, len(data)) + data)


async def receive(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the kind and data of the next frame. Raises: IncompleteReadError, OSError; ValueError for none of ours."""
    kind, length = FRAME.unpack(await reader.readexactly(FRAME.size))
    if length > MAX_FRAME_BYTES:
        raise ValueError("a frame that is too long")
    return kind, await reader.readexactly(length)
