"""What the daemon says of a run that does not go on; and that it says nothing of one that does."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distui.core.telemetry.ledger import Ledger
from distui.daemon.runs.snapshot import load_state, read_snapshot, take_snapshot
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def waiting(rank: SimulatedRank, seq: int, for_s: float, group: str = "data_parallel") -> None:
    rank.beat(
        step=3,
        phase="backward",
        waiting_in=f"all_reduce {group}#{seq}",
        waiting_since_s=time.time() - for_s,
        last_seq={group: seq},
    )


def test_a_killed_rank_is_named_and_then_the_run_has_failed(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run()
    processes = [node.process("sleep", "60") for _ in range(2)]
    for number, process in enumerate(processes):
        ranks(run, number, pid=process.pid).started().steps(1, 3).publish()
    assert node.snapshot(run).run.state == "running" and not node.snapshot(run).diagnosis
    processes[1].kill()
    processes[1].wait()
    snapshot = node.wait(run, lambda found: found.diagnosis)
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks)) == ("dead_rank", [1])
    assert f"pid {processes[1].pid}" in found.message and "after step 3" in found.message
    assert [rank.state for rank in snapshot.ranks] == ["running", "dead"]
    assert snapshot.run.state == "stalled"
    processes[0].kill()
    processes[0].wait()
    snapshot = node.wait(run, lambda found: found.run.state == "failed")
    assert "gone" in snapshot.run.message
    (event,) = [
        event.event
        for event in next(iter(node.monitor.Watch(pb.WatchRequest(run_id=run.run_id)))).events
        if event.event.attributes["ranks"] == "1"
    ]
    assert event.kind == "dead_rank" and event.level == pb.Event.ERROR


def test_a_rank_that_closes_its_stream_and_ends_is_not_dead(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    launcher = ranks(run, -1)
    launcher.add(run_started=pb.RunStarted(world_size=1)).publish(close=True)
    process = node.process("sleep", "60")
    ranks(run, 0, pid=process.pid, world_size=1).started().steps(1, 3).publish(close=True)
    process.kill()
    process.wait()
    snapshot = node.wait(run, lambda found: found.ranks[0].state == "finished")
    assert snapshot.run.state == "running" and not snapshot.diagnosis  # its launcher will say how it ended
    assert not read_snapshot(run).diagnosis
    launcher.add(run_finished=pb.RunFinished(state="finished")).publish()
    assert node.snapshot(run).run.state == "finished"


def test_the_rank_that_the_others_wait_for_is_the_culprit(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=4)
    asleep = node.process("sleep", "600").pid  # this process works, which would excuse it
    all_ranks = [ranks(run, number, pid=asleep, world_size=4) for number in range(4)]
    for rank in all_ranks:
        rank.started().steps(1, 3)
        if rank.source.rank == 2:
            rank.beat(step=3, phase="data", last_seq={"data_parallel": 11}).publish()
        else:
            waiting(rank, 12, 8.0)
            rank.publish()
    snapshot = node.wait(run, lambda found: found.diagnosis)
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks)) == ("data_stall", [2])
    assert (found.collective, found.group, found.seq) == ("all_reduce", "data_parallel", 12)
    assert found.since_s > 7 and "has not entered all_reduce #12 of data_parallel" in found.message
    assert [rank.state for rank in snapshot.ranks] == ["waiting", "waiting", "running", "waiting"]
    assert snapshot.run.state == "stalled"
    assert read_snapshot(run).diagnosis[0].ranks == [2]
    for rank in all_ranks:
        rank.beat(step=4, phase="data", last_seq={"data_parallel": 12}).publish()
    snapshot = node.wait(run, lambda found: not found.diagnosis)
    assert snapshot.run.state == "running"
    request = pb.WatchRequest(run_id=run.run_id, interval_s=0.05)
    for update in node.monitor.Watch(request, timeout=180):
        if any(event.event.kind == "data_stall_over" for event in update.events):
            break


def test_ranks_that_wait_in_another_order_are_told_as_a_circle(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    for number, (group, other) in enumerate((("a", "b"), ("b", "a"))):
        rank = ranks(run, number).steps(1, 3)
        rank.beat(
            step=3,
            waiting_in=f"all_reduce {group}#5",
            waiting_since_s=time.time() - 9,
            last_seq={group: 5, other: 4},
        )
        state.apply(rank.batch())
    (found,) = take_snapshot(state, time.time()).diagnosis
    assert list(found.ranks) == [0, 1] and "circle" in found.message


def test_a_stopped_process_is_the_culprit(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    process = node.process("sleep", "60")
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        pass
    past_s = time.time() - 9
    stopped = ranks(run, 1, pid=process.pid)
    stopped.add(past_s, step=pb.Step(step=3, step_s=0.1)).beat(time_s=past_s, step=3, last_seq={"data_parallel": 12})
    state.apply(stopped.batch())
    rank = ranks(run, 0).steps(1, 3)
    waiting(rank, 12, 8.0)
    state.apply(rank.batch())
    snapshot = take_snapshot(state, time.time())
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks)) == ("hang", [1]) and f"kill -CONT {process.pid}" in found.message
    assert [rank.state for rank in snapshot.ranks] == ["waiting", "stopped"]


def test_different_operations_in_one_place_are_a_mismatch(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run(world_size=3)
    state = load_state(run)
    for number in range(3):
        rank = ranks(run, number, world_size=3)
        ledger = Ledger(
            run.rank_ledger(number), rank=number, world_size=3, incarnation=rank.source.incarnation, capacity=8
        )
        op = "all_gather" if number == 1 else "all_reduce"
        ledger.set_step(3)
        ledger.waiting(ledger.begin("data_parallel", op, "float32", 64, 3))
        state.apply(rank.steps(1, 3).batch())
    assert not take_snapshot(state, time.time()).diagnosis
    (found,) = take_snapshot(state, time.time() + 20).diagnosis
    assert (found.kind, list(found.ranks), found.seq) == ("mismatch", [1], 1)
    assert "rank 1: all_gather" in found.message and "ranks 0, 2: all_reduce" in found.message


def test_who_differs_is_named_once_the_majority_has_come(node: Node, ranks: type[SimulatedRank]) -> None:
    """On a busy machine one of those who agree comes last: until then the other two could both be wrong."""
    run = node.run(world_size=3)
    state = load_state(run)
    process = node.process("sleep", "60")
    ledgers = []
    for number in range(3):
        rank = ranks(run, number, world_size=3, pid=process.pid if number == 2 else None)
        ledger = Ledger(
            run.rank_ledger(number), rank=number, world_size=3, incarnation=rank.source.incarnation, capacity=8
        )
        ledger.set_step(3)
        ledgers.append(ledger)
        state.apply(rank.steps(1, 3).batch())
    for number in (1, 2):
        op = "all_gather" if number == 1 else "all_reduce"
        ledgers[number].waiting(ledgers[number].begin("data_parallel", op, "float32", 64, 3))
    assert not take_snapshot(state, time.time() + 2).diagnosis
    process.kill()  # gloo ends who gets what it did not expect
    process.wait()
    assert [found.kind for found in take_snapshot(state, time.time() + 2).diagnosis] == ["dead_rank"]
    ledgers[0].waiting(ledgers[0].begin("data_parallel", "all_reduce", "float32", 64, 3))
    found = take_snapshot(state, time.time() + 2).diagnosis[0]
    assert (found.kind, list(found.ranks)) == ("mismatch", [1]) and "ranks 0, 2: all_reduce" in found.message


def test_what_a_rank_ended_of_is_known_when_it_could_not_send_it(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    state = load_state(run)
    process = node.process("sleep", "60")
    for number in range(2):
        rank = ranks(run, number, pid=process.pid if number == 1 else None)
        ledger = Ledger(
            run.rank_ledger(number), rank=number, world_size=2, incarnation=rank.source.incarnation, capacity=8
        )
        state.apply(rank.steps(1, 3).batch())
    ledger.ended(1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes")
    ledger.lost(3)  # no memory was left to send them
    process.kill()
    process.wait()
    snapshot = take_snapshot(state, time.time() + 1)
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks)) == ("out_of_memory", [1]) and "can't allocate memory" in found.message
    assert snapshot.dropped == 3


def test_slow_starts_checkpoints_and_short_waits_are_no_hang(node: Node, ranks: type[SimulatedRank]) -> None:
    for name, phase, num_steps, for_s in (
        ("first-step", "forward", 0, 60.0),
        ("saving", "checkpoint", 5, 60.0),
        ("short", "backward", 5, 3.0),
        ("slow-steps", "backward", 5, 40.0),
    ):
        run = node.run(name)
        state = load_state(run)
        for number in range(2):
            rank = ranks(run, number).started().steps(1, num_steps, step_s=10.0 if name == "slow-steps" else 0.1)
            if number == 0:
                waiting(rank, 12, for_s)
                rank.records[-1].heartbeat.step = num_steps
            else:
                rank.beat(step=num_steps, phase=phase, last_seq={"data_parallel": 11})
            state.apply(rank.batch())
        snapshot = take_snapshot(state, time.time())
        assert not snapshot.diagnosis, name
        assert snapshot.run.state == ("starting" if name == "" else "running")


def test_real_ranks_that_hang_are_named_from_their_ledgers(node: Node) -> None:
    node.start()
    run = node.run()
    command = [sys.executable, str(Path(__file__).with_name("real_rank.py")), str(run.path)]
    processes = [node.process(*command, str(rank), "2") for rank in range(2)]

    def tell(rank: int, line: str) -> None:
        process = processes[rank]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ok\n"

    tell(0, "step 5")
    tell(1, "step 5")
    snapshot = node.wait(run, lambda found: len(found.ranks) == 2 and all(rank.step == 5 for rank in found.ranks))
    assert snapshot.run.state == "running" and not snapshot.diagnosis
    replies = list(node.control.Execute(pb.ControlRequest(run_id=run.run_id, verb="checkpoint"), timeout=180))
    assert sorted((reply.rank, reply.state, reply.message) for reply in replies if reply.state == "done") == [
        (0, "done", "saved at step 7"),
        (1, "done", "saved at step 7"),
    ]
    tell(0, "wait")
    snapshot = node.wait(run, lambda found: found.diagnosis)
    (found,) = snapshot.diagnosis
    assert (found.kind, list(found.ranks), found.group, found.seq) == ("hang", [1], "data_parallel", 6)
    stacks = list(node.control.Execute(pb.ControlRequest(run_id=run.run_id, verb="stacks"), timeout=180))
    assert all(b"MainThread" in reply.payload for reply in stacks if reply.state == "done") and len(stacks) == 4
    for rank in range(2):
        tell(rank, "close")
    request = pb.WatchRequest(run_id=run.run_id, interval_s=0.05)
    last = [update.snapshot for update in node.monitor.Watch(request, timeout=0.5 + 20) if update.snapshot][-1:]
    for process in processes:
        assert process.stdin is not None
    assert [rank.state for rank in last[0].ranks] == ["finished", "finished"]
    assert last[0].run.state == "finished" and not last[0].diagnosis
