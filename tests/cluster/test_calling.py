"""Hosts that call: the door lets in who has the token, carries a command's streams, and lets hosts go at the end."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starters.door import FRAME, Door

ENDED_S = 60.0
ECHO = """
import sys
print("first", flush=True)
sys.stderr.write("aside\\n")
print(sys.stdin.read(), end="")
sys.exit(7)
"""


@pytest_asyncio.fixture
async def door(tmp_path: Path) -> AsyncIterator[tuple[Door, str]]:
    made = Door()
    for name, data in zip(("token", "cert.pem"), made.secrets, strict=True):
        (tmp_path / name).write_bytes(data)
    yield made, f"127.0.0.1:{await made.open('127.0.0.1', 0)}"
    await made.close(0)


async def caller(where: str, folder: Path) -> asyncio.subprocess.Process:
    words = ("-m", "distui.launcher.node.caller", where, "pod0", str(folder))
    return await asyncio.create_subprocess_exec(sys.executable, *words)


async def test_commands_run_where_the_call_comes_from(door: tuple[Door, str], tmp_path: Path) -> None:
    made, where = door
    early = made.start(Host("pod0", 1), [sys.executable, "-c", ECHO])
    early.stdin.write(b"before the call\n")
    process = await caller(where, tmp_path)
    assert await asyncio.wait_for(early.stdout.readline(), ENDED_S) == b"first\n"
    early.stdin.write(b"and after\n")
    early.stdin.close()
    assert await asyncio.wait_for(early.wait(), ENDED_S) == 7
    assert await early.stdout.read() == b"before the call\nand after\n"
    assert await early.stderr.read() == b"aside\n"
    # The same host calls again, for the next command; one that is killed is told so.
    late = made.start(Host("pod0", 1), [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
    assert await asyncio.wait_for(late.stdout.readline(), ENDED_S) == b"up\n"
    late.kill()
    assert await asyncio.wait_for(late.wait(), ENDED_S) == -9
    left = made.start(Host("pod0", 1), [sys.executable, "-c", "import sys; print('in', flush=True); sys.stdin.read()"])
    assert await asyncio.wait_for(left.stdout.readline(), ENDED_S) == b"in\n"
    await made.close(5)
    assert await asyncio.wait_for(process.wait(), ENDED_S) == 5, "and its command with it"


async def test_who_has_another_token_gets_nothing(door: tuple[Door, str], tmp_path: Path) -> None:
    made, where = door
    called = made.start(Host("pod0", 1), ["true"])
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    context.check_hostname = False
    host, _, port = where.partition(":")
    for said in (b'{"token": "guess", "name": "pod0"}', b"{}", b"[" * 10_000, b"not json"):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(FRAME.pack(b"h", len(said)) + said)
        assert await asyncio.wait_for(reader.read(), ENDED_S) == b""
        writer.close()
    assert called.returncode is None, "the command still waits for its host"
    called.kill()
