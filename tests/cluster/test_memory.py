"""Checkpoints in host memory: whole or not at all, gone with their keeper, read back bit for bit."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distui.core.checkpoint.memory import Agent
from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.paths import MEMORY_FOLDER_ENV
from distui.launcher.cluster.gang import Gang
from distui.launcher.cluster.hosts import Host
from distui.launcher.memory.keeper import Keeper
from distui.launcher.memory.shelves import Shelves
from distui.launcher.node.facts import Hello
from distui.proto import cluster_pb2 as pb
from tests.cluster.conftest import Place, last_of_each


@pytest.fixture
def keeper(place: Place) -> Iterator[Keeper]:
    """Give a keeper of two ranks of a job on one host."""
    found = Keeper(place.path / "keep", lambda save, kept: found.settle(save))
    yield found
    found.close()


def memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, content)
    return descriptor


def hand_over(socket: str, save: str, step: int, rank: int) -> None:
    files = {f"rank{rank:05d}.bin": memory_file(f"{save} of {rank}".encode())}
    if rank == 0:
        files["manifest.json"] = memory_file(b"{}")
    try:
        Agent(socket).ask(files, keep=save, step=step, rank=rank, num_ranks=2)
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def test_a_save_is_there_once_all_ranks_have_handed_over(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    socket, arrived, take = keeper.begin([0, 1])["DISTUI_MEMORY"], threading.Semaphore(0), keeper.take_copy

    def take_copy(*arguments: Any) -> None:
        take(*arguments)
        arrived.release()

    monkeypatch.setattr(keeper, "take_copy", take_copy)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(hand_over, socket, "old", 5, 0)
        hand_over(socket, "old", 5, 1)
        first.result()
        half = pool.submit(hand_over, socket, "half", 10, 0)
        for _ in range(3):
            assert arrived.acquire(timeout=30.0)
        assert keeper.newest() == ("old", 5), "of step 10 rank 1 has handed over nothing: the one before stays"
        folder = Path(keeper.begin([0, 1], "old")[MEMORY_FOLDER_ENV])
        with pytest.raises(OSError, match="another attempt has begun"):
            half.result()
    assert (folder / "old" / "rank00001.bin").read_bytes() == b"old of 1"
    assert (folder / "manifest.json").read_bytes() == b"{}"
    with pytest.raises(OSError, match=r"no other host has rank00007.bin"):
        Agent(socket).ask(want="rank00007.bin")
    with pytest.raises(OSError, match="leads elsewhere"):
        Agent(socket).ask(want="../evil")
    with pytest.raises(ValueError, match="lead elsewhere"):
        keeper.take_copy("old", 5, 2, {"../evil": memory_file(b"")})
    keeper.begin([0, 1])
    assert keeper.newest() is None and not folder.exists()


def members(*names: str) -> Gang:
    gang = Gang([Host(name, 1) for name in names], lambda: 0.0, 300.0)
    for member in gang.members:
        gang.joined(
            member.node,
            Hello(member.host.name, member.host.name, "", {}, "", True, {}, keeps_at=f"{member.host.name}:1"),
        )
    return gang


def kept(save: str, step: int, rank: int, *, pending: bool = False, copy: bool = False) -> pb.Kept:
    facts = pb.SaveFacts(save=save, step=step, world_size=3, ranks=[rank])
    return pb.Kept(save=facts, pending=pending, copy=copy)


def test_what_a_lost_host_had_is_with_its_partner() -> None:
    gang = members("a", "b", "c")
    shelves = Shelves(gang.members)
    for step, save in ((5, "old"), (10, "new")):
        for node in range(3):
            assert not shelves.kept(node, kept(save, step, node, pending=True))
        for node in range(3):
            assert not shelves.kept((node + 1) % 3, kept(save, step, node, copy=True))
            assert shelves.kept(node, kept(save, step, node)) == (node == 2), "once the last copy is there"
    for node in range(2):
        shelves.kept(node, kept("half", 15, node, pending=True))
    gang.lose(1, "is gone")
    assert shelves.newest() == "new" and shelves.step("new") == 10, "of step 15 rank 2's files were never there"
    start = pb.Start()
    shelves.add_to(start, 0, 2, "new")
    assert start.partner == "c:1" and start.restore.save.step == 10
    assert [(one.address, list(one.ranks)) for one in start.restore.holders] == [("c:1", [1])]
    gang.joined(1, gang.members[1].hello)  # type: ignore[arg-type]
    assert shelves.newest() == "new"
    start = pb.Start()
    shelves.add_to(start, 1, None, "new")
    found = [(one.address, list(one.ranks)) for one in start.restore.holders]
    assert found == [("a:1", [0, 2]), ("c:1", [1])], "its new agent has nothing"
    gang.lose(2, "is gone too")
    assert not shelves.newest(), "rank 1's files are lost with b and its partner"


def test_what_cannot_be_kept_is_told_before() -> None:
    config = Config.model_validate({"cluster": {"nproc": 1}, "checkpoint": {"memory_every_steps": 5}})
    assert [one.path for one in check(config)] == ["checkpoint.memory_every_steps"]
    config.cluster.max_restarts = 1
    assert not check(config)


MEMORY = ("--max-restarts", "1", "--set", "checkpoint.memory_every_steps=3")


def check_resumed(place: Place, told: str, num_ranks: int, *words: str) -> None:
    """See that all ranks went on from memory, and did what they do when nobody kills them, bit for bit."""
    # A save that is still on its way keeps the next one from being made.
    found = re.search(r"restart 1 of 1, from the checkpoint of step ([36]) in memory", told)
    assert found, told
    whole = place.distui("launch", "--nproc", str(num_ranks), *words, "steps.py", json.dumps({"out": "whole"}))
    assert whole.returncode == 0, whole.stderr
    for rank in range(num_ranks):
        steps = place.steps("m", rank)
        assert next(one["step"] for one in steps if one["attempt"]) == int(found[1]) + 1
        assert last_of_each(steps) == last_of_each(place.steps("whole", rank))
    assert not (place.runs()[0].path / "checkpoints").exists()


def test_a_killed_rank_goes_on_from_its_own_memory(place: Place) -> None:
    options = {"out": "m", "kill": 8, "pause_s": 0.1}
    done = place.distui("launch", "--nproc", "2", *MEMORY, "steps.py", json.dumps(options))
    assert done.returncode == 0, done.stdout + done.stderr
    check_resumed(place, done.stderr, 2)


@pytest.mark.cluster
@pytest.mark.parametrize("stage", ["0", "3"])
def test_a_lost_agent_s_states_come_from_its_partner(place: Place, stage: str) -> None:
    words = ("launch", "--hosts", "a:2,b:1", "--set", "cluster.starter=local", "--zero", stage, *MEMORY)
    options = {"out": "m", "kill": 8, "rank": 2, "victim": "DISTUI_AGENT_PID", "pause_s": 0.1}
    done = place.distui(*words, "steps.py", json.dumps(options))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("what was left of the job there has been ended") == 1, "a second ends what comes next"
    check_resumed(place, done.stderr, 3, "--zero", stage)
