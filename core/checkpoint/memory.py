"""Checkpoints in host memory, kept by the agents of the ranks' hosts: a rank that is killed does not take them along.

A rank writes into memory files (memfd) what it would write into a folder, and hands them to its agent over a socket.
An agent shows what it has as a folder of links to them, so that they are read like any other checkpoint. What lies with
the agent of another host is fetched when it is first needed: of sharded states, only what this host's ranks read.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch.distributed as dist

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.folder import Manifest
from distui.core.checkpoint.layout import write_index, write_rank
from distui.core.checkpoint.reading import Checkpoint
from distui.core.checkpoint.together import Failed, together
from distui.core.checkpoint.writing import Snapshot, form_of
from distui.core.errors import UserError
from distui.core.paths import MEMORY_ENV, MEMORY_FOLDER_ENV

COPIES = 4
"""Of each rank's state while a save is kept: the old one and the new one, on its own host and on a partner."""
ANSWER_S = 300.0
"""For so long an agent may take to have a save kept, by its partner too, or to fetch a file from another host."""


class Agent:
    """The agent that keeps this rank's saves, over the socket at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path

    @classmethod
    def of_this_rank(cls) -> Agent | None:
        """Return the agent of this rank's host; None where none keeps anything."""
        path = os.environ.get(MEMORY_ENV)
        return cls(path) if path else None

    def ask(self, files: dict[str, int] | None = None, **asked: Any) -> None:
        """Send a request, with open files by name, and wait until it is done. Raises: OSError in the agent's words."""
        names = list(files or {})
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as line:
            line.settimeout(ANSWER_S)
            line.connect(self._path)
            message = json.dumps({**asked, "files": names}).encode()
            socket.send_fds(line, [message], [files[name] for name in names] if files else [])
            answer = json.loads(line.recv(1 << 16) or b'{"problem": "the agent has hung up"}')
        if answer["problem"]:
            raise OSError(answer["problem"])


class _MemoryFiles:
    """New files in memory, by their names."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}

    def open(self, path: Path) -> BinaryIO:
        """Make one for writing; it stays until `close`."""
        found = self.by_name[path.name] = os.memfd_create(path.name, os.MFD_CLOEXEC)
        return open(found, "wb", buffering=1 << 20, closefd=False)

    def close(self) -> None:
        """Give them up; what was handed to an agent stays there."""
        for descriptor in self.by_name.values():
            os.close(descriptor)


@contextmanager
def _memory_files() -> Iterator[_MemoryFiles]:
    files = _MemoryFiles()
    try:
        yield files
    finally:
        files.close()


def keep(snapshot: Snapshot, group: dist.ProcessGroup | None, agent: Agent, *, checks_room: bool) -> None:
    """Have the agents of all ranks keep `snapshot`, in place of the one before. Collective.

    Raises: UserError on all ranks where one of them has no room (`checks_room`), or its agent could not keep it.
    """
    step, lineage, main = snapshot.facts["step"], str(snapshot.facts["lineage"]), snapshot.rank == 0

    def begin() -> dict[str, Any]:
        name = f"distui-{step:08d}-{lineage[:8]}-{secrets.token_hex(4)}" if main else ""
        room = {"host": os.uname().nodename, "free": psutil.virtual_memory().available, "bytes": snapshot.nbytes}
        return {"data": name, "saved_at_s": snapshot.facts["saved_at_s"], "large": snapshot.large(), **room}

    with _memory_files() as files:
        try:
            begun = together(begin, group)
            if checks_room:
                _check_room(begun)
            data = Path(begun[0]["data"])

            def write_own() -> dict[str, Any]:
                items, common = snapshot.items_of(begun), snapshot.common if main else None
                return write_rank(data, snapshot.rank, items, snapshot.own, common, files.open)

            parts = together(write_own, group)

            def hand_over() -> None:
                if os.environ.get("LOCAL_RANK", "0") == "0":  # each host knows what the save is of
                    facts = snapshot.facts | {"saved_at_s": begun[0]["saved_at_s"]} | form_of(parts)
                    _write_manifest(data, facts, parts, files)
                agent.ask(files.by_name, keep=data.name, step=step, rank=snapshot.rank, num_ranks=len(parts))

            together(hand_over, group)
        except Failed as error:
            raise UserError(
                f"step {step} is not kept in memory", str(error), "see launcher.log of the run for the agents' words"
            ) from None


def _write_manifest(data: Path, facts: Manifest, parts: list[Any], files: _MemoryFiles) -> None:
    named = {f"{data.name}/{name}": fact for name, fact in write_index(data, parts, files.open).items()}
    manifest = {"format": folders.FORMAT, **facts, "data": data.name, "files": named}
    with files.open(data / folders.MANIFEST) as file:
        file.write(json.dumps(manifest).encode())


def _check_room(begun: list[dict[str, Any]]) -> None:
    needed: dict[str, int] = {}
    for one in begun:
        needed[one["host"]] = needed.get(one["host"], 0) + COPIES * one["bytes"]
    for one in begun:
        if needed[one["host"]] > one["free"]:
            need, free = needed[one["host"]], one["free"]
            raise UserError(
                f"no room for checkpoints in the memory of {one['host']}",
                f"its ranks' states need {need:,} bytes ({COPIES} copies: two saves, here and at a partner), "
                f"and {free:,} are free",
                "set checkpoint.memory_every_steps to 0, or use more hosts",
            )


class MemoryCheckpoint(Checkpoint):
    """A checkpoint in the memory of this host's agent, which fetches what other agents have of it."""

    def _facts(self, name: str) -> dict[str, Any]:
        found = super()._facts(name)
        if not (self._data / name).exists():
            agent = Agent.of_this_rank()
            assert agent is not None, "whoever has the folder has the agent"
            try:
                agent.ask(want=name)
            except OSError as error:
                raise UserError(
                    f"{name} of the checkpoint in memory cannot be had",
                    str(error),
                    "start the run again with checkpoint.resume=always: it goes on from the disk",
                ) from error
        return found


def folder_in_memory() -> Path | None:
    """Return the folder of the checkpoint in memory that this attempt may go on from; None without one."""
    found = os.environ.get(MEMORY_FOLDER_ENV)
    return Path(found) if found else None
