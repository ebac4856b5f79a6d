"""What the daemon is told, it keeps exactly once: over restarts, repeats, torn files and bad input."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from distui.core.paths import RunFolder, control_socket, daemon_socket
from distui.daemon.runs.snapshot import load_state, read_snapshot, snapshot_json
from distui.daemon.runs.store import RunLog, read_batches, segment_files
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def steps_on_disk(run: RunFolder, rank: int) -> list[int]:
    return [
        record.step.step
        for batch in read_batches(run)
        if batch.source.rank == rank
        for record in batch.records
        if record.HasField("step")
    ]


def test_a_killed_daemon_keeps_exactly_what_it_acknowledged(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run()
    rank = ranks(run, 0).started().steps(1, 50)
    assert rank.publish(keep=True) == 51
    node.kill()
    node.start()
    assert rank.steps(51, 80).publish(keep=True) == 81  # all again, as a rank does after a reconnect
    assert rank.publish() == 81
    assert steps_on_disk(run, 0) == list(range(1, 81))
    (state,) = node.snapshot(run).ranks
    assert (state.step, state.state) == (80, "running")
    assert state.loss == pytest.approx(0.05)
    assert state.step_s == pytest.approx(0.1)
    assert state.tokens_per_s == pytest.approx(1000.0)
    assert not state.HasField("memory_bytes")


def test_a_restarted_rank_counts_from_one_again(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    ranks(run, 0, world_size=1).steps(1, 9).publish()
    again = ranks(run, 0, world_size=1).steps(5, 7, loss=2.5)
    again.dropped = 4
    again.publish()
    snapshot = node.snapshot(run)
    assert snapshot.ranks[0].step == 7 and snapshot.dropped == 4
    update = next(iter(node.monitor.Watch(pb.WatchRequest(run_id=run.run_id))))
    assert [step.step for step in update.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert update.steps[-1].loss == 2.5


@pytest.mark.parametrize("tail", [b"\x40\x00\x00\x00half a fra", bytes(100_000)], ids=["half", "zeros"])
def test_a_torn_tail_is_passed_over_and_then_cut_off(node: Node, ranks: type[SimulatedRank], tail: bytes) -> None:
    """The process was killed in the midst of a frame; or the machine, and the disk had the file's length only."""
    node.start()
    run = node.run()
    rank = ranks(run, 0)
    rank.steps(1, 5).publish()
    node.kill()
    (segment,) = segment_files(run)
    whole = segment.stat().st_size
    with open(segment, "ab") as file:
        file.write(tail)
    assert steps_on_disk(run, 0) == [1, 2, 3, 4, 5]
    node.start()
    rank.steps(6, 7).publish()
    assert steps_on_disk(run, 0) == [1, 2, 3, 4, 5, 6, 7]
    assert tail not in segment.read_bytes() and segment.stat().st_size > whole


def test_a_log_goes_on_in_the_next_segment(node: Node, ranks: type[SimulatedRank]) -> None:
    run = node.run()
    rank = ranks(run, 0)
    for first in range(1, 100, 10):
        log = RunLog(run, segment_bytes=200)
        rank.records.clear()
        log.append(rank.steps(first, first + 4).batch())
        rank.records.clear()
        log.append(rank.steps(first + 5, first + 9).batch())
        log.close()
    assert len(segment_files(run)) > 2
    assert steps_on_disk(run, 0) == list(range(1, 101))


def test_a_full_disk_stops_the_runs_telemetry_and_nothing_else(
    node: Node, ranks: type[SimulatedRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distui.daemon.serve.live import LiveRun

    run = node.run(world_size=1)
    live = LiveRun(load_state(run), time.time_ns())
    rank = ranks(run, 0, world_size=1)
    live.keep(rank.steps(1, 3).batch())
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]) if len(data) > 7 else _no_space())
    rank.records.clear()
    live.keep(rank.steps(4, 6).batch())
    monkeypatch.undo()
    assert steps_on_disk(run, 0) == [1, 2, 3]
    assert live.state.ranks[0].last_step is not None and live.state.ranks[0].last_step.step == 6
    assert live.state.dropped == 3
    event = live.state.events.all()[-1].event
    assert event.kind == "telemetry_stopped" and "No space left" in event.message
    monkeypatch.setattr("distui.daemon.serve.live.RETRY_S", 0.0)
    rank.records.clear()
    live.keep(rank.steps(7, 8).batch())  # somebody has made room
    assert steps_on_disk(run, 0) == [1, 2, 3, 7, 8]
    event = live.state.events.all()[-1].event
    assert event.kind == "telemetry_resumed" and "3 records are missing" in event.message
    live.close()


def _no_space() -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"run_id": ""}, "must name"),
        ({"run_dir": "runs/train-1"}, "not absolute"),
        ({"run_dir": "/proc"}, "not"),
        ({"run_dir": "/nowhere/train-1"}, "No such file"),
        ({"run_id": "other"}, "not the folder of run 'other'"),
        ({"records": [pb.Record(seq=2), pb.Record(seq=2)]}, "must ascend"),
        ({"source": pb.Source(rank=0)}, "incarnation"),
        ({"source": pb.Source(rank=-2, incarnation=1)}, "no rank"),
        ({"source": pb.Source(rank=1 << 30, incarnation=1)}, "no rank"),
        ({"records": [pb.Record(seq=1, rank_started=pb.RankStarted(world_size=1 << 31))]}, "65536"),
    ],
)
def test_a_malformed_batch_is_refused(
    node: Node, ranks: type[SimulatedRank], change: dict[str, object], told: str
) -> None:
    node.start()
    run = node.run()
    batch = ranks(run, 0).steps(1, 1).batch()
    for name in change:
        batch.ClearField(name)
    batch.MergeFrom(pb.Batch(**change))  # type: ignore[arg-type]
    publish = sys.modules["tests.grpc.simulated_ranks"].publish
    with pytest.raises(grpc.RpcError) as error:
        publish([batch])
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and told in str(error.value.details())
    assert not segment_files(run)


def test_bytes_that_are_no_batch_and_too_many_bytes_are_refused(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run()
    module = sys.modules["tests.grpc.simulated_ranks"]
    with module.channel() as channel:
        raw = channel.stream_stream("/distui.v1.Telemetry/Publish")
        with pytest.raises(grpc.RpcError):
            list(raw(iter([b"\xff\xff\xff no protobuf"]), timeout=180))
        big = ranks(run, 0).batch()
        big.run_id = "x" * (9 << 20)
        with pytest.raises(grpc.RpcError) as error:
            list(raw(iter([big.SerializeToString()]), timeout=180))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ranks(run, 0).steps(1, 2).publish() == 2


def test_sockets_are_private_and_a_second_daemon_is_refused(node: Node) -> None:
    first = node.start()
    for socket in (daemon_socket(), control_socket()):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    second = subprocess.run([sys.executable, "-m", "distui.daemon"], capture_output=True, text=True, cwd="/")
    assert second.returncode == 2 and f"pid {first.pid}" in second.stderr and "Traceback" not in second.stderr
    assert node.kill(signal.SIGTERM) == 0
    assert not daemon_socket().exists() and not control_socket().exists()
    assert "Traceback" not in (node.folder / "daemon.log").read_text()


def test_stale_sockets_of_a_killed_daemon_are_replaced(node: Node) -> None:
    node.start()
    node.kill()
    assert daemon_socket().exists()
    node.start()
    assert node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=180, wait_for_ready=True).pid == node.daemon.pid  # type: ignore[union-attr]


def test_an_idle_daemon_ends_and_a_needed_one_does_not(node: Node, ranks: type[SimulatedRank]) -> None:
    daemon = node.start("--idle-s", "1.2")
    run = node.run(world_size=1)
    process = node.process("sleep", "60")
    ranks(run, 0, pid=process.pid, world_size=1).steps(1, 1).publish()
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(2.5)
    process.kill()
    process.wait()
    assert daemon.wait(120) == 0
    node.daemon = None


def test_a_finished_run_reads_the_same_from_disk_and_from_the_daemon(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run()
    launcher = ranks(run, -1)
    launcher.add(run_started=pb.RunStarted(name="train", world_size=2, num_nodes=1, strategy="ZeRO-2, bf16"))
    launcher.publish()
    for number in range(2):
        rank = ranks(run, number).started(num_parameters=7, peak_flops=1e3).steps(1, 30, flops=10.0)
        rank.add(memory=pb.Memory(rss_bytes=1000 + number, by_category_bytes={"parameters": 3}))
        for seq in range(1, 4):
            entered_s = 100.0 + seq + 0.25 * number
            rank.add(
                collective=pb.Collective(
                    group="world", seq=seq, op="all_reduce", bytes=8, enqueued_s=entered_s, finished_s=entered_s + 1,
                    group_size=2, blocked_s=0.5,
                )
            )  # fmt: skip
        rank.add(metrics=pb.Metrics(step=30, values={"accuracy": 0.5}))
        rank.add(rank_finished=pb.RankFinished()).publish()
    launcher.add(run_finished=pb.RunFinished(state="finished")).publish()
    told, read = node.snapshot(run), read_snapshot(run)
    assert told == read
    assert told.run.state == "finished" and [rank.state for rank in told.ranks] == ["finished"] * 2
    assert [rank.memory_bytes for rank in told.ranks] == [1000, 1001]
    (collective,) = told.collectives
    assert (collective.count, collective.bytes, collective.mean_s, collective.blocked_s) == (6, 48, 1.0, 3.0)
    assert dict(collective.lateness_s) == {0: 0.0, 1: 0.25} and dict(collective.last_seq) == {0: 3, 1: 3}
    updates = list(node.monitor.Watch(pb.WatchRequest(run_id=run.run_id, max_points=10), timeout=180))
    assert len(updates) == 1 and len(updates[0].steps) == 10 and len(updates[0].metrics) == 2
    last = updates[0].steps[-1]
    assert last.step == 30 and last.tokens_per_s == pytest.approx(2000) and last.mfu == pytest.approx(20 / (0.1 * 2e3))
    node.kill(signal.SIGTERM)
    assert read_snapshot(run) == told
    shown = snapshot_json(told)
    assert set(shown) == {"run", "state", "strategy", "ranks", "diagnosis", "dropped", "progress", "restarts", "effort"}
    assert set(shown["ranks"][0]) == {
        "rank", "node", "pid", "state", "busy", "step", "loss", "step_s", "tokens_per_s",
        "samples_per_s", "memory_bytes",
    }  # fmt: skip


def test_publish_ends_with_the_request_stream_and_a_probe_does_no_harm(node: Node, ranks: type[SimulatedRank]) -> None:
    import socket as sockets

    node.start()
    run = node.run()
    for _ in range(5):
        with sockets.socket(sockets.AF_UNIX) as probe:
            probe.connect(str(daemon_socket()))
    module = sys.modules["tests.grpc.simulated_ranks"]
    first, second = ranks(run, 0).steps(1, 3), ranks(run, 1).steps(1, 4)
    assert module.publish([first.batch(), second.batch()]) == [3, 4]
    assert rpc.TelemetryStub is not None and len(node.snapshot(run).ranks) == 2
