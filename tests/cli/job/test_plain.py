"""The job without a screen: rank 0's log as it grows, and lines from the daemon's stream. The daemon here is a fake
that answers over a real Unix socket."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from distui.core.paths import RunFolder
from distui.launcher.job.announce import Announcer
from distui.launcher.job.outcome import Outcome
from distui.launcher.job.plain import FirstFailure, LogCopy, Progress, progress_line
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc


class FakeDaemon(rpc.TelemetryServicer, rpc.MonitorServicer):
    """Keeps what is published, and streams the updates that a test hands over."""

    def __init__(self) -> None:
        self.batches: list[pb.Batch] = []
        self.refuse = False
        self.updates: list[pb.Update] = []
        self.more = threading.Event()

    def Publish(self, batches: Iterator[pb.Batch], context: Any) -> Iterator[pb.Ack]:
        for batch in batches:
            if self.refuse:
                context.abort(grpc.StatusCode.UNAVAILABLE, "full")
            self.batches.append(batch)
            yield pb.Ack(seq=batch.records[-1].seq)

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Update]:
        yield from self.updates
        self.more.wait(10)


@pytest.fixture
def place() -> Iterator[tuple[FakeDaemon, Path, RunFolder]]:
    """A fake daemon, its socket, and a run."""
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        run = RunFolder(Path(folder) / "run-1")
        run.create()
        spec = {"name": "run", "command": ["train.py", "ü"], "strategy": "ZeRO-2, fp32", "config_toml": "[run]\n"}
        run.spec.write_text(json.dumps({**spec, "world_size": 2, "num_nodes": 1, "planned_memory_bytes": {"all": 5}}))
        daemon, socket = FakeDaemon(), Path(folder) / "d.sock"
        server = grpc.server(ThreadPoolExecutor(4))
        rpc.add_TelemetryServicer_to_server(daemon, server)
        rpc.add_MonitorServicer_to_server(daemon, server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        yield daemon, socket, run
        daemon.more.set()
        server.stop(0.2).wait()


def test_the_launcher_announces_the_beginning_and_the_end(place: tuple[FakeDaemon, Path, RunFolder]) -> None:
    daemon, socket, run = place
    announcer = Announcer(run, socket)
    announcer.started()
    announcer.finished(Outcome("failed", 3, "rank 1: boom"))
    first, second = daemon.batches
    assert (first.run_id, first.run_dir, first.source.rank) == ("run-1", str(run.path), -1)
    assert first.source == second.source and first.source.pid == os.getpid()
    (started,), (finished,) = first.records, second.records
    assert (started.seq, finished.seq) == (1, 2)
    assert list(started.run_started.command) == ["train.py", "ü"]
    assert dict(started.run_started.planned_memory_bytes) == {"all": 5}
    assert (finished.run_finished.state, finished.run_finished.exit_status) == ("failed", 3)


def test_what_the_daemon_did_not_take_is_sent_again(place: tuple[FakeDaemon, Path, RunFolder]) -> None:
    daemon, socket, run = place
    announcer = Announcer(run, socket)
    daemon.refuse = True
    announcer.started()
    assert "full" in (run.logs / "launcher.log").read_text()
    daemon.refuse = False
    announcer.finished(Outcome("finished", 0, ""))
    (batch,) = daemon.batches
    assert [record.WhichOneof("body") for record in batch.records] == ["run_started", "run_finished"]


def test_a_folder_that_is_gone_does_not_stop_the_launcher(
    place: tuple[FakeDaemon, Path, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon, socket, run = place
    announcer = Announcer(run, socket)
    shutil.rmtree(run.path)
    daemon.refuse = True
    announcer.finished(Outcome("finished", 0, ""))
    assert "the daemon did not take the launcher's records" in capsys.readouterr().err


def update(step: int, time_s: float, *diagnosis: pb.Diagnosis) -> pb.Update:
    ranks = [pb.RankState(rank=rank, memory_bytes=(rank + 1) << 20) for rank in range(2)]
    summary = pb.StepSummary(step=step, step_s=0.081, tokens_per_s=12_300, loss=2.871)
    snapshot = pb.Snapshot(ranks=ranks, diagnosis=list(diagnosis))
    return pb.Update(snapshot=snapshot, steps=[summary], server_time_s=time_s)


def test_a_line_of_progress_now_and_then_and_a_diagnosis_at_once(
    place: tuple[FakeDaemon, Path, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon, socket, run = place
    hang = pb.Diagnosis(kind="hang", ranks=[1], group="world", seq=7, message="rank 1 has not entered all_reduce")
    daemon.updates = [
        update(1, 100.0),
        update(2, 101.0),
        update(3, 102.0, hang),
        update(3, 108.0, hang),
        update(9, 120),
    ]
    progress = Progress(run, socket)
    progress.start()
    told = ""
    deadline = time.monotonic() + 10
    while "step 9" not in told and time.monotonic() < deadline:
        told += capsys.readouterr().err
        time.sleep(0.02)
    progress.stop()
    assert told.splitlines() == [
        "distui: step 1, loss 2.871, 12.3 k tokens/s, 81.0 ms a step, 2.00 MiB on rank 1",
        "distui: hang: rank 1 has not entered all_reduce",
        "distui: step 3, loss 2.871, 12.3 k tokens/s, 81.0 ms a step, 2.00 MiB on rank 1",
        "distui: step 9, loss 2.871, 12.3 k tokens/s, 81.0 ms a step, 2.00 MiB on rank 1",
    ]


def test_samples_where_there_are_no_tokens_and_the_end_where_it_is_known() -> None:
    step = pb.StepSummary(step=40, step_s=0.5, samples_per_s=64)
    snapshot = pb.Snapshot(step=40, total_steps=200, left_s=80)
    assert progress_line(step, snapshot) == "step 40 of 200, 64 samples/s, 500 ms a step, 1m 20s left"


def test_what_is_not_known_is_left_out() -> None:
    assert progress_line(pb.StepSummary(step=4, step_s=2.0), pb.Snapshot()) == "step 4, 2.00 s a step"


def test_the_log_is_copied_as_it_grows(tmp_path: Path) -> None:
    log, out = tmp_path / "rank0.log", io.BytesIO()
    copy = LogCopy(log, out)
    copy.copy()  # there is no log yet
    with open(log, "ab", buffering=0) as file:
        for part in (b"one\n", "ü✓".encode()[:3], "ü✓".encode()[3:], b"\xff last"):
            file.write(part)
            copy.copy()
    copy.close()
    assert out.getvalue() == "one\nü✓".encode() + b"\xff last"


def test_a_report_that_is_being_written_is_no_failure_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "train-1")
    run.create()
    (run.errors / ".rank1.json.0f0f.tmp").write_text("")
    first = FirstFailure(run, 0)
    first.tell()
    assert capsys.readouterr().err == ""
    run.rank_error(1).write_text('{"rank": 1, "type": "KeyError", "message": "7", "time_s": 1.0}')
    first.tell()
    assert "rank 1 failed first: KeyError: 7" in capsys.readouterr().err
