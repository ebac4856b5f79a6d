"""What watchers and the control service get from a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
import zmq
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from distui.core.errors import DaemonUnavailable, UserError
from distui.core.paths import control_socket, daemon_socket, default_runs_dir, runtime_dir
from distui.daemon.node.spawn import daemon_alive, ensure_daemon
from distui.daemon.runs.folders import find_run
from distui.daemon.runs.history import History
from distui.launcher.job import daemon_keeper
from distui.launcher.job.daemon_keeper import DaemonKeeper
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def test_a_watcher_gets_the_past_then_what_is_new_then_the_end(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run()
    first, second = ranks(run, 0).steps(1, 40), ranks(run, 1).steps(1, 39, step_s=0.2)
    first.add(event=pb.Event(kind="checkpoint", message="saved"))
    first.publish()
    second.publish()
    stream = node.monitor.Watch(pb.WatchRequest(run_id="", interval_s=0.05, max_points=5), timeout=180)
    update = next(stream)
    assert update.snapshot.run.run_id == run.run_id and update.server_time_s > 0
    steps = [step.step for step in update.steps]
    assert len(steps) == 5 and steps[-1] == 39 and steps == sorted(set(steps))  # rank 1 has not sent step 40
    assert [event.event.message for event in update.events] == ["saved"]
    last = update.steps[-1]
    assert (last.slowest_rank, last.tokens_per_s) == (1, pytest.approx(1000)) and last.step_s == pytest.approx(0.15)
    assert list(last.rank_step_s) == pytest.approx([0.1, 0.2]) and not last.HasField("mfu")
    second.steps(40, 41).publish()
    first.steps(41, 41).add(event=pb.Event(kind="evaluation", message="done")).publish()
    new_steps, new_events = [], []
    for update in stream:
        new_steps += [step.step for step in update.steps]
        new_events += [event.event.kind for event in update.events if event.rank >= 0]
        if new_steps[-1:] == [41] and new_events:
            break
    assert new_steps == [40, 41] and new_events == ["evaluation"]
    first.steps(42, 42).publish()
    ranks(run, -1).add(run_finished=pb.RunFinished(state="failed", exit_status=3, message="rank 1: boom")).publish()
    *_, update = stream
    assert [step.step for step in update.steps][-1:] in ([42], [])
    assert (update.snapshot.run.state, update.snapshot.run.exit_status) == ("failed", 3)
    assert node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=180).num_watchers == 0


def test_hardware_of_the_node_is_sampled_and_kept(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    ranks(run, 0, world_size=1).steps(1, 1).publish()
    snapshot = node.wait(run, lambda found: found.nodes)
    (found,) = snapshot.nodes
    assert found.node == snapshot.ranks[0].node
    assert 0 < found.hardware.memory_used_bytes < found.hardware.memory_total_bytes == psutil.virtual_memory().total


def test_runs_are_found_by_name_beginning_and_folder(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    old, new = node.run("alpha-1", started_s=100.0), node.run("alpha-2", started_s=200.0)
    old.outcome.write_text('{"state": "stopped", "exit_status": 130, "message": "by SIGINT", "finished_s": 150.0}')
    listed = node.monitor.ListRuns(pb.ListRunsRequest(), timeout=180).runs
    assert [(run.run_id, run.state) for run in listed] == [("alpha-2", "failed"), ("alpha-1", "stopped")]
    assert len(node.monitor.ListRuns(pb.ListRunsRequest(limit=1), timeout=180).runs) == 1
    assert find_run(None, default_runs_dir()) == new
    assert find_run("alpha-1", default_runs_dir()) == find_run(str(old.path), default_runs_dir()) == old
    for name, told in (("alpha", "2 begin with it"), ("alhpa-2", "alpha-2")):
        with pytest.raises(UserError) as error:
            find_run(name, default_runs_dir())
        assert told in error.value.report()
    with pytest.raises(UserError, match="no run yet"):
        find_run(None, node.folder)
    with pytest.raises(grpc.RpcError) as refused:
        node.monitor.GetSnapshot(pb.SnapshotRequest(run_id="beta"), timeout=180)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND and "alpha-2" in str(refused.value.details())
    assert node.snapshot(old).run.message == "by SIGINT"


def test_runs_kept_elsewhere_are_found_by_the_next_daemon(node: Node, ranks: type[SimulatedRank]) -> None:
    from distui.core.paths import RunFolder

    run = RunFolder(node.folder / "elsewhere" / "beta-1")
    run.create()
    run.spec.write_text('{"started_s": 5.0, "world_size": 1}')
    node.start()
    ranks(run, 0, world_size=1).steps(1, 2).publish()
    node.kill()
    node.start()
    assert node.snapshot(run).ranks[0].step == 2


def test_logs_are_read_in_pieces_and_from_the_end(node: Node) -> None:
    node.start()
    run = node.run()
    run.rank_log(1).write_bytes(b"0123456789")

    def read(rank: int, offset: int, max_bytes: int = 0) -> pb.ReadLogResponse:
        request = pb.ReadLogRequest(run_id=run.run_id, rank=rank, offset=offset, max_bytes=max_bytes)
        found: pb.ReadLogResponse = node.monitor.ReadLog(request, timeout=180)
        return found

    assert read(1, 0, 4) == pb.ReadLogResponse(data=b"0123", next_offset=4, size=10)
    assert read(1, 4) == pb.ReadLogResponse(data=b"456789", next_offset=10, size=10)
    assert read(1, 10).data == b"" and read(1, 99).next_offset == 10
    assert read(1, -3).data == b"789" and read(1, -99).data == b"0123456789"
    assert read(0, 0) == read(-1, 0) == pb.ReadLogResponse()
    with pytest.raises(grpc.RpcError) as error:
        read(2, 0)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "0 to 1" in str(error.value.details())


def test_absent_ranks_are_answered_for(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=3)
    ranks(run, 0, world_size=3).steps(1, 1).publish()
    dead = node.process("true")
    dead.wait()
    ranks(run, 1, pid=dead.pid, world_size=3).steps(1, 1).publish()
    request = pb.ControlRequest(run_id=run.run_id, verb="stacks", deadline_s=0.5)
    replies = {reply.rank: reply for reply in node.control.Execute(request, timeout=180)}
    assert {rank: reply.state for rank, reply in replies.items()} == dict.fromkeys(range(3), "error")
    assert "control bus" in replies[0].message and "dead" in replies[1].message
    assert "never heard" in replies[2].message
    with pytest.raises(grpc.RpcError) as error:
        list(node.control.Execute(pb.ControlRequest(run_id=run.run_id, verb="dance"), timeout=180))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "stacks" in str(error.value.details())


@contextlib.contextmanager
def _greeted(run_id: str, pid: int) -> Iterator[zmq.Socket[bytes]]:
    """Give the control bus's connection of rank 0, which process `pid` is said to be."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{control_socket()}")
        dealer.send(b"no json")
        dealer.send(b'{"type": "hello"}')
        hello = {"type": "hello", "run_id": run_id, "rank": 0, "pid": pid, "node": "here"}
        dealer.send(json.dumps(hello).encode())
        yield dealer


def test_a_rank_that_does_not_answer_is_an_error_at_the_deadline(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    ranks(run, 0, world_size=1).steps(1, 9).publish()
    with _greeted(run.run_id, os.getpid()) as dealer:
        request = pb.ControlRequest(run_id=run.run_id, verb="profile", arguments={"steps": "2"}, deadline_s=0.4)
        (reply,) = node.control.Execute(request, timeout=180)
        assert reply.state == "error" and "did not answer" in reply.message
        command = json.loads(dealer.recv())
    assert command["verb"] == "profile" and command["arguments"] == {"steps": "2", "at_step": "13"}


def test_a_rank_that_dies_over_a_command_is_told_at_once(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    rank = node.process("sleep", "600")
    ranks(run, 0, pid=rank.pid, world_size=1).steps(1, 9).publish()
    with _greeted(run.run_id, rank.pid) as dealer:
        call = node.control.Execute(pb.ControlRequest(run_id=run.run_id, verb="profile", deadline_s=3600), timeout=180)
        assert json.loads(dealer.recv())["verb"] == "profile"
        rank.kill()
        (reply,) = call
    assert reply.state == "error" and f"rank 0 (pid {rank.pid}) ended before it answered" in reply.message


def test_health_and_reflection_name_the_services(node: Node) -> None:
    node.start()
    assert daemon_alive()
    with sys.modules["tests.grpc.simulated_ranks"].channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=180)
    names = {service.name for service in answer.list_services_response.service}
    assert {"distui.v1.Telemetry", "distui.v1.Monitor", "distui.v1.Control", "grpc.health.v1.Health"} <= names
    node.kill()
    assert not daemon_alive()


def test_ensure_daemon_starts_one_that_outlives_its_starter(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTUI_JOB", "/some/run")
    assert not daemon_alive()
    assert ensure_daemon() == ensure_daemon() == daemon_socket()
    pid = node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=180).pid
    process = psutil.Process(pid)
    try:
        assert os.getsid(pid) == pid != os.getsid(0) and "DISTUI_JOB" not in process.environ()
        assert process.ppid() != os.getpid()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert not daemon_socket().exists()


def test_a_daemon_that_cannot_start_is_told_with_its_log(node: Node) -> None:
    (runtime_dir() / "control.sock").mkdir()
    with pytest.raises(DaemonUnavailable, match=r"(?s)ended at once.*control\.sock"):
        ensure_daemon(10)
    Path(runtime_dir() / "control.sock").rmdir()


def test_a_daemon_that_could_not_be_started_is_tried_again_while_the_job_runs(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(daemon_keeper, "CHECK_EVERY_S", 0.05)
    (runtime_dir() / "control.sock").mkdir()
    with DaemonKeeper(daemon_socket()):
        deadline = time.monotonic() + 120
        while "tried again" not in capsys.readouterr().err and time.monotonic() < deadline:
            time.sleep(0.05)
        (runtime_dir() / "control.sock").rmdir()
        while not daemon_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        process = psutil.Process(node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=180).pid)
    process.send_signal(signal.SIGTERM)
    process.wait(120)


def test_histories_stay_short_and_keep_their_ends() -> None:
    history: History[int] = History(10, 8)
    for number in range(1, 1001):
        history.append(number)
    kept = history.all()
    assert len(kept) <= 18 and kept[0] == 1 and kept[-10:] == list(range(991, 1001)) and kept == sorted(kept)
    assert history.after(997) == [998, 999, 1000] and history.after(1000) == [] and history.head == 1000
    assert history.all(4)[-1] == 1000 and len(history.all(4)) == 4
    none: History[int] = History(2, 0)
    for number in range(5):
        none.append(number)
    assert none.all() == [3, 4]
