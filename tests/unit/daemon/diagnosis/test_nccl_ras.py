"""NCCL's RAS service is asked in its own protocol; the service itself needs GPUs, so a stand-in answers here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis import nccl_ras
from distui.daemon.diagnosis.observe import this_node
from distui.daemon.runs.state import RunState
from distui.daemon.serve.live import LiveRun
from distui.proto import telemetry_pb2 as pb

ANSWER = """NCCL version 2.27.5 compiled with CUDA 12.9
CUDA runtime version 12.9, driver version 12.9

Job summary
===========

  Nodes  Processes         GPUs  Processes     GPUs
(total)   per node  per process    (total)  (total)
      1          2            1          2        2

Communicators... (0.00s)
=============

Group     Comms     Nodes     Ranks     Ranks     Ranks    Status  Errors
    #  in group  per comm  per node  per comm  in group
    0         1         1         2         2         2   RUNNING      OK

Errors
======

Warnings
========

#0-0 (27a079b828ff1a75) MISMATCH
  Communicator ranks have different collective operation counts
  1 ranks have launched up to operation 6650
  1 ranks have launched up to operation 6649
  Rank 1 -- GPU 1 managed by process 483072 on node 172.16.64.210
"""


class StandIn:
    """Speaks RAS's protocol on a free port."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.silent = False
        self.greeting = "SERVER PROTOCOL 2"
        self.port = 0
        self._served: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> StandIn:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for served in self._served:
            with contextlib.suppress(ConnectionResetError):  # who asked has heard enough
                await served

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().strip():
            self.heard.append(line)
            if self.silent:
                continue
            answer = {"CLIENT": f"{self.greeting}\n", "TIMEOU": "OK\n", "VERBOS": ANSWER}.get(line[:6], "ERROR\n")
            writer.write(answer.encode())
            if line == "VERBOSE STATUS":
                break
        writer.close()
        await writer.wait_closed()


async def test_the_answer_is_whole_and_its_findings_are_one_line() -> None:
    async with StandIn() as ras:
        assert await nccl_ras.ask("127.0.0.1", ras.port) == ANSWER
        assert ras.heard == ["CLIENT PROTOCOL 2", "TIMEOUT 5", "VERBOSE STATUS"]
    found = nccl_ras.findings(ANSWER)
    assert found.startswith("warnings: #0-0 (27a079b828ff1a75) MISMATCH Communicator ranks have different")
    assert "Rank 1 -- GPU 1" in found and "errors" not in found
    assert nccl_ras.findings(ANSWER.partition("Warnings")[0]) == ""


async def test_who_is_not_ras_or_says_nothing_is_an_error() -> None:
    async with StandIn() as ras:
        ras.silent = True
        with pytest.raises(TimeoutError, match="has not answered within"):
            await nccl_ras.ask("127.0.0.1", ras.port, patience_s=0.1)
    async with StandIn() as other:
        other.greeting = "HTTP/1.1 400"
        with pytest.raises(ConnectionError, match="it is not NCCL's RAS"):
            await nccl_ras.ask("127.0.0.1", other.port)


async def test_a_line_without_an_end_and_an_address_that_is_none_are_errors() -> None:
    """Any user of the node may listen where RAS does."""
    async with StandIn() as other:
        other.greeting = "x" * (1 << 20)
        with pytest.raises(ConnectionError, match="is not NCCL's RAS"):
            await nccl_ras.ask("127.0.0.1", other.port)
    for host, port in (("127.0.0.1", 99_999), ("x" * 300, 1)):
        with pytest.raises(OSError):
            await nccl_ras.ask(host, port)


async def test_a_run_that_stands_still_is_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_ras, "AGAIN_S", 0.0)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    live = LiveRun(RunState(folder), incarnation=1)
    snapshot = pb.Snapshot(
        ranks=[pb.RankState(rank=0, node=this_node(), pid=os.getpid(), device="cuda:0")],
        diagnosis=[pb.Diagnosis(kind="hang", ranks=[0])],
    )
    monkeypatch.setattr(live, "snapshot", lambda: snapshot)
    async with StandIn() as ras:
        monkeypatch.setattr(nccl_ras, "ADDRESS", ("127.0.0.1", ras.port))
        watch = nccl_ras.RasWatch()
        await watch.look([live])
        await watch.look([live])
        assert ras.heard.count("VERBOSE STATUS") == 2, "a mismatch of the first answer may be one of timing"
    (told,) = [event.event for event in live.state.events.all()]
    assert told.kind == "nccl_ras" and "MISMATCH" in told.message
    assert (folder.path / "nccl_ras.txt").read_text() == ANSWER
    live.close()
