"""Who is at work is not hung, who left is named, who is being stopped is not dead: real processes, made-up waits."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distui.core.telemetry.ledger import _ENTRY, _HEADER, MAGIC, VERSION, Ledger
from distui.core.telemetry.stacks import _HEAD, stack_path
from distui.daemon.runs.snapshot import load_state, snapshot_json, take_snapshot
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from distui.core.paths import RunFolder
    from distui.daemon.runs.state import RunState
    from tests.grpc.simulated_ranks import Node, SimulatedRank

COMPUTES = (sys.executable, "-c", "while True: pass")
COPIES = ("dd", "if=/dev/zero", "of=/dev/null", "bs=1M")
WAITS_FOR_A_CHILD = ("sh", "-c", "sleep 60; true")
SLEEPS = ("sleep", "60")
LOCKED = (sys.executable, "-c", "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()")


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def in_kernel(pid: int, *names: str) -> None:
    """Wait until the process sleeps in one of these kernel functions."""
    until = time.monotonic() + 120
    while not any(name in Path(f"/proc/{pid}/wchan").read_text() for name in names):
        assert time.monotonic() < until


def held_up(
    node: Node,
    ranks: type[SimulatedRank],
    command: tuple[str, ...],
    *,
    for_s: float = 20.0,
    op: str = "all_reduce",
    phase: str = "idle",
) -> tuple[RunState, int]:
    """Return a run in which rank 1 waits for rank 0, and the pid of that."""
    state = load_state(node.run(f"{Path(command[0]).name}-{op}-{phase}-{time.time_ns()}"))
    process = node.process(*command)
    first = ranks(state.run, 0, pid=process.pid).started().steps(1, 3)
    state.apply(first.beat(step=3, phase=phase, last_seq={"world": 3}).batch())
    second = ranks(state.run, 1).started().steps(1, 3)
    wait: Any = {"waiting_in": f"{op} world#4", "waiting_since_s": time.time() - for_s, "last_seq": {"world": 4}}
    state.apply(second.beat(step=3, phase="idle", **wait).batch())
    return state, process.pid


@pytest.mark.parametrize("command", [COMPUTES, COPIES, WAITS_FOR_A_CHILD])
def test_a_rank_at_work_is_busy_and_not_hung(node: Node, ranks: type[SimulatedRank], command: tuple[str, ...]) -> None:
    state, pid = held_up(node, ranks, command)
    if command is WAITS_FOR_A_CHILD:
        in_kernel(pid, "do_wait")
    until, snapshot = time.monotonic() + 120, take_snapshot(state, time.time())
    while snapshot.diagnosis and time.monotonic() < until:  # a full machine lets it work only now and then
        snapshot = take_snapshot(state, time.time())
    assert not snapshot.diagnosis and snapshot.run.state == "running"
    assert "of a core" in snapshot.ranks[0].busy and not snapshot.ranks[1].busy
    assert snapshot_json(snapshot)["ranks"][0]["busy"] == snapshot.ranks[0].busy
    (found,) = take_snapshot(state, time.time() + 1000).diagnosis  # a loop that spins looks the same
    assert (found.kind, list(found.ranks)) == ("hang", [0])


def test_a_rank_that_does_nothing_is_hung(node: Node, ranks: type[SimulatedRank]) -> None:
    state, pid = held_up(node, ranks, SLEEPS)
    in_kernel(pid, "nanosleep")
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert (found.kind, list(found.ranks)) == ("hang", [0])


def test_a_declared_evaluation_is_no_hang_however_long(node: Node, ranks: type[SimulatedRank]) -> None:
    state, _ = held_up(node, ranks, SLEEPS, for_s=5000.0, phase="evaluation")
    snapshot = take_snapshot(state, time.time())
    assert not snapshot.diagnosis and snapshot.ranks[0].busy == "evaluates"


@pytest.mark.parametrize(("phase", "busy"), [("input", "waits for somebody's input"), ("debugger", "is in a debugger")])
def test_a_rank_that_waits_for_a_person_is_not_hung_however_long(
    node: Node, ranks: type[SimulatedRank], phase: str, busy: str
) -> None:
    state, _ = held_up(node, ranks, SLEEPS, for_s=5000.0, phase=phase)
    snapshot = take_snapshot(state, time.time())
    assert not snapshot.diagnosis and snapshot.ranks[0].busy == busy


def test_a_debugger_that_nobody_told_of_is_seen_in_the_stack(node: Node, ranks: type[SimulatedRank]) -> None:
    state, _ = held_up(node, ranks, SLEEPS, for_s=5000.0, phase="forward")
    stack(state.run, 0, 4000.0, "/lib/IPython/terminal/embed.py:209 __call__")
    snapshot = take_snapshot(state, time.time())
    assert not snapshot.diagnosis and snapshot.ranks[0].busy == "is in a debugger"


def test_what_one_does_alone_before_a_barrier_gets_more_time(node: Node, ranks: type[SimulatedRank]) -> None:
    state, pid = held_up(node, ranks, SLEEPS, op="barrier")
    in_kernel(pid, "nanosleep")
    assert not take_snapshot(state, time.time()).diagnosis
    (found,) = take_snapshot(state, time.time() + 20).diagnosis
    assert (found.kind, list(found.ranks), found.collective) == ("hang", [0], "barrier")


def test_who_left_the_loop_early_is_named(node: Node, ranks: type[SimulatedRank]) -> None:
    """Also while another, who has not come yet, is at work."""
    run = node.run(world_size=3)
    state = load_state(run)
    for number in range(3):
        rank = ranks(run, number, world_size=3).started().steps(1, 5)
        if number == 0:
            rank.beat(step=5, last_seq={"world": 5}).add(rank_finished=pb.RankFinished(exit_status=0))
        elif number == 1:
            rank.beat(step=5, last_seq={"world": 5})
        else:
            wait: Any = {
                "waiting_in": "all_reduce world#6",
                "waiting_since_s": time.time() - 9,
                "last_seq": {"world": 6},
            }
            rank.beat(step=5, **wait)
        state.apply(rank.batch())
    snapshot = take_snapshot(state, time.time())
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks), found.seq) == ("left_early", [0], 6)
    assert "ended after step 5 while others wait" in found.message and snapshot.run.state == "stalled"


def test_who_lost_a_peer_that_left_early_is_not_blamed(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    process = node.process("sleep", "60")
    process.kill()
    process.wait()
    for number in range(2):
        rank = ranks(run, number, pid=process.pid).started().steps(1, 5)
        ledger = Ledger(
            run.rank_ledger(number), rank=number, world_size=2, incarnation=rank.source.incarnation, capacity=8
        )
        for _ in range(5 + number):
            ledger.end(ledger.begin("world", "all_reduce", "float32", 64, 2))
        ledger.ended(number, "RuntimeError: Connection closed by peer [127.0.0.1]:1234" if number else "")
        state.apply(rank.batch())
    (found,) = take_snapshot(state, time.time() + 1).diagnosis
    assert (found.kind, list(found.ranks), found.seq) == ("left_early", [0], 6)
    assert "rank 1" in found.message and "all_reduce #6 of world" in found.message


FORKS = "import os, sys, time\nif os.fork(): os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\ntime.sleep(600)"


def test_a_child_that_carries_on_in_the_place_of_a_rank_is_named(node: Node, ranks: type[SimulatedRank]) -> None:
    """It has a session of its own, and only its environment tells whose child it is."""
    run = node.run()
    state = load_state(run)
    process = node.process("env", f"DISTUI_JOB={run.path}", "RANK=1", sys.executable, "-c", FORKS)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.wait(60)
        state.apply(ranks(run, 0).started().steps(1, 5).beat(step=5, last_seq={"world": 5}).batch())
        state.apply(ranks(run, 1, pid=process.pid).started().steps(1, 5).batch())
        (soon,) = take_snapshot(state, time.time() + 1).diagnosis
        (later,) = take_snapshot(state, time.time() + 10).diagnosis
    finally:
        os.kill(child, 9)
    assert (soon.kind, later.kind, list(later.ranks)) == ("dead_rank", "dead_rank", [1])
    assert "its child" not in soon.message, "a loader's workers are still on their way out"
    assert f"its child process {child} goes on without it" in later.message
    assert "train in that" in later.message


def stack(run: RunFolder, rank: int, for_s: float, frame: str = "/job/train.py:31 step") -> None:
    """Write where a rank's main thread has been for so long, as its side thread does."""
    text, now_s = frame.encode(), time.time()
    stack_path(run, rank).write_bytes(_HEAD.pack(now_s, now_s - for_s, len(text), zlib.crc32(text), 1) + text)
    stack_path(run, rank).chmod(0o600)


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_that_all_wait_for_a_lock_are_told(node: Node, ranks: type[SimulatedRank], world: int) -> None:
    run = node.run(world_size=world)
    state = load_state(run)
    for number in range(world):
        process = node.process(*LOCKED)
        in_kernel(process.pid, "futex")
        rank = ranks(run, number, pid=process.pid, world_size=world).started().steps(1, 3)
        state.apply(rank.beat(step=3, phase="forward").batch())
        stack(run, number, 5.0)
    assert not take_snapshot(state, time.time()).diagnosis
    for number in range(world):
        stack(run, number, 15.0)
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert (found.kind, list(found.ranks)) == ("hang", list(range(world)))
    assert "for a lock" in found.message and "train.py:31 in step" in found.message


def test_a_job_that_sleeps_or_computes_in_one_place_is_not_stuck(node: Node, ranks: type[SimulatedRank]) -> None:
    for command in (SLEEPS, COMPUTES):
        run = node.run(Path(command[0]).name, world_size=1)
        state = load_state(run)
        rank = ranks(run, 0, pid=node.process(*command).pid, world_size=1).started().steps(1, 3)
        state.apply(rank.beat(step=3, phase="forward").batch())
        stack(run, 0, 100.0)
        assert not take_snapshot(state, time.time()).diagnosis


def test_nothing_is_said_of_ranks_that_are_not_seen(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run(world_size=4)
    state = load_state(run)
    for number in range(2):
        rank = ranks(run, number, world_size=4).started().steps(1, 3)
        wait: Any = {"waiting_in": "all_reduce world#4", "waiting_since_s": time.time() - 9, "last_seq": {"world": 4}}
        state.apply(rank.beat(step=3, **wait).batch())
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert "all ranks" not in found.message and "2 other ranks are not seen from here" in found.message


def two_dead(node: Node, ranks: type[SimulatedRank]) -> RunState:
    run = node.run()
    state = load_state(run)
    for number in range(2):
        process = node.process("sleep", "60")
        state.apply(ranks(run, number, pid=process.pid).started().steps(1, 3).batch())
        process.kill()
        process.wait()
    return state


def test_what_the_launcher_ends_is_no_fault(node: Node, ranks: type[SimulatedRank]) -> None:
    state = two_dead(node, ranks)
    assert [found.kind for found in take_snapshot(state, time.time()).diagnosis] == ["dead_rank"]
    state.run.ending.write_text(json.dumps({"stopped_by": "SIGINT", "ranks": []}))
    state.run.ending.chmod(0o600)
    assert not take_snapshot(state, time.time()).diagnosis


def test_the_first_to_end_and_its_signal_stay_the_verdict_while_the_others_are_ended(
    node: Node, ranks: type[SimulatedRank]
) -> None:
    state = two_dead(node, ranks)
    first = {"rank": 1, "pid": 1, "exit_status": None, "signal": 11, "time_s": time.time()}
    state.run.ending.write_text(json.dumps({"stopped_by": None, "ranks": [first]}))
    state.run.ending.chmod(0o600)
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert (found.kind, list(found.ranks)) == ("dead_rank", [1]) and "was ended by SIGSEGV" in found.message


def test_who_was_killed_before_it_was_heard_of_is_named(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    process = node.process("sleep", "60")
    source = ranks(run, 0).started().steps(1, 3)
    error = "RuntimeError: Connection closed by peer"
    state.apply(source.add(rank_finished=pb.RankFinished(exit_status=1, error=error)).batch())
    ledger = Ledger(run.rank_ledger(1), rank=1, world_size=2, capacity=8)
    _HEADER.pack_into(ledger.buffer, 0, MAGIC, VERSION, _ENTRY.size, 8, 1, 2, process.pid, time.time_ns())
    assert [list(found.ranks) for found in take_snapshot(state, time.time() + 1).diagnosis] == [[0]]
    process.kill()
    process.wait()
    snapshot = take_snapshot(state, time.time() + 1)
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks)) == ("dead_rank", [1]) and "without a word" in found.message
    assert [rank.pid for rank in snapshot.ranks] == [source.source.pid, process.pid]


def test_a_rank_of_which_nothing_came_yet_is_known_by_its_ledger(node: Node, ranks: type[SimulatedRank]) -> None:
    """On a full machine a rank may hang before its first batch was sent."""
    run = node.run()
    state = load_state(run)
    process = node.process("sleep", "60")
    waits: Any = {"waiting_in": "all_reduce world#1", "waiting_since_s": time.time() - 400, "last_seq": {"world": 1}}
    state.apply(ranks(run, 0).started().beat(phase="forward", **waits).batch())
    ledger = Ledger(run.rank_ledger(1), rank=1, world_size=2, capacity=8)
    struct.pack_into("@Q", ledger.buffer, 40, process.pid)  # the header's pid: it is that process's ledger
    in_kernel(process.pid, "nanosleep")
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert (found.kind, list(found.ranks)) == ("hang", [1])


def test_all_that_are_stopped_are_named_with_the_first(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    for number, since_s in enumerate((60.0, 0.5)):
        process = node.process("sleep", "60")
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        state.apply(ranks(run, number, pid=process.pid).started().steps(1, 5).batch())
        state.ranks[number].last_seen_s = time.time() - since_s
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert (found.kind, list(found.ranks)) == ("hang", [0, 1])
