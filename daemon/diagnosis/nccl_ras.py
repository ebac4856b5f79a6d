"""What NCCL's own RAS service says of a job that stands still: asked once an incident, kept beside the run.

RAS runs inside every NCCL process (2.24 and later) and answers on one TCP port a node. The words of the protocol are
those of NCCL's client, `ncclras` (src/ras/client.cc).
"""

from __future__ import annotations

import asyncio
import logging
import re

import psutil

from distui.core.paths import write_own
from distui.daemon.diagnosis.observe import this_node
from distui.daemon.serve.live import LiveRun
from distui.proto import telemetry_pb2 as pb

ADDRESS = ("localhost", 28028)
ASKED_FOR = frozenset({"hang", "mismatch", "dead_rank", "out_of_memory", "gpu_error"})
ANSWER_S = 5.0
"""NCCL waits so long for its other processes; asked for with TIMEOUT."""
PATIENCE_S = 10.0
AGAIN_S = 1.0
"""Ranks that are on their way look like a mismatch to RAS: the second answer is the one that is kept."""
MAX_BYTES = 4 << 20
MAX_WORDS = 600

_SECTION = re.compile(r"^(?P<title>[A-Z][^\n]*)\n=+\n(?P<text>.*?)(?=^[A-Z][^\n]*\n=+\n|\Z)", re.MULTILINE | re.DOTALL)
_log = logging.getLogger("distui.daemon")


async def ask(host: str, port: int, patience_s: float = PATIENCE_S) -> str:
    """Return what RAS says of the job that NCCL runs there. Raises: OSError where nobody answers as RAS does.

    On a port of loopback any user of the node may listen.
    """

    async def talk() -> str:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            for words, answer in (("CLIENT PROTOCOL 2", "SERVER PROTOCOL "), (f"TIMEOUT {ANSWER_S:.0f}", "OK")):
                writer.write(f"{words}\n".encode())
                line = (await reader.readline()).decode(errors="replace")
                if not line.startswith(answer):
                    raise ConnectionError(f"{host}:{port} answers {line.strip()!r} to {words!r}: it is not NCCL's RAS")
            writer.write(b"VERBOSE STATUS\n")
            parts, size = [], 0
            while size < MAX_BYTES and (part := await reader.read(65536)):
                parts.append(part)
                size += len(part)
            return b"".join(parts).decode(errors="replace")
        finally:
            writer.close()
            await writer.wait_closed()

    try:
        return await asyncio.wait_for(talk(), patience_s)
    except (ValueError, OverflowError) as error:  # a line without an end; an address that is none
        raise ConnectionError(f"{host}:{port} is not NCCL's RAS: {error}") from error
    except asyncio.TimeoutError:
        raise TimeoutError(f"{host}:{port} has not answered within {patience_s:g} s") from None


def findings(answer: str) -> str:
    """Return the errors and warnings of an answer in one line; "" where RAS finds nothing wrong."""
    found = {match["title"].strip(): " ".join(match["text"].split()) for match in _SECTION.finditer(answer)}
    words = "; ".join(f"{title.lower()}: {found[title]}" for title in ("Errors", "Warnings") if found.get(title))
    return words if len(words) <= MAX_WORDS else f"{words[: MAX_WORDS - 1]}…"


class RasWatch:
    """Asks RAS once about each run of this node that goes wrong with NCCL."""

    def __init__(self) -> None:
        self._asked: set[tuple[str, str]] = set()

    async def look(self, runs: list[LiveRun]) -> None:
        """Ask where a run has a new verdict that RAS may know more of, and say what it answers."""
        for live in runs:
            snapshot = live.snapshot()
            kind = next((found.kind for found in snapshot.diagnosis if found.kind in ASKED_FOR), "")
            here = [rank for rank in snapshot.ranks if rank.node == this_node() and rank.device.startswith("cuda")]
            if not kind or not here or (live.run.run_id, kind) in self._asked:
                continue
            self._asked.add((live.run.run_id, kind))
            await self._ask_of(live, _address([rank.pid for rank in here]))

    async def _ask_of(self, live: LiveRun, address: tuple[str, int]) -> None:
        try:
            await ask(*address)
            await asyncio.sleep(AGAIN_S)
            answer = await ask(*address)
            path = live.run.path / "nccl_ras.txt"
            await asyncio.to_thread(write_own, path, answer)
        except OSError as error:
            _log.info("%s: NCCL's RAS was asked in vain: %s", live.run.run_id, error)
            return
        words = findings(answer) or "nothing wrong"
        message = f"NCCL's RAS finds {words}; all of it: {path}"
        live.say(pb.Record(event=pb.Event(level=pb.Event.WARNING, kind="nccl_ras", message=message)))


def _address(pids: list[int]) -> tuple[str, int]:
    """Return where RAS listens: NCCL_RAS_ADDR of the first rank that can still be looked at, else NCCL's default."""
    for pid in pids:
        try:
            host, _, port = psutil.Process(pid).environ().get("NCCL_RAS_ADDR", "").rpartition(":")
        except psutil.Error:
            continue  # it is dead: its peers were started alike
        return (host.strip("[]") or ADDRESS[0], int(port)) if port.isdecimal() else ADDRESS
    return ADDRESS
