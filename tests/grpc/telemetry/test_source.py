"""The rank's source against a real gRPC server on a Unix socket: all arrives once, in order, or is counted."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder, daemon_socket
from distui.core.telemetry import source as source_module
from distui.core.telemetry.ledger import LedgerReader
from distui.core.telemetry.source import NullSource, current, open_source
from distui.daemon.runs.unsent import unsent_batches
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc

FAST = TelemetrySection(flush_s=0.02, heartbeat_s=0.1)


class Server(telemetry_pb2_grpc.TelemetryServicer):
    """A daemon's intake: keeps what is new, acknowledges if told to."""

    def __init__(self) -> None:
        self.records: list[pb.Record] = []
        self.batches: list[pb.Batch] = []
        self.num_repeated = 0
        self.acknowledges = True
        self.arrived = threading.Condition()
        self._grpc: grpc.Server | None = None

    def Publish(self, batches: Iterator[pb.Batch], context: grpc.ServicerContext) -> Iterator[pb.Ack]:
        for batch in batches:
            with self.arrived:
                last = self.records[-1].seq if self.records else 0
                new = [record for record in batch.records if record.seq > last]
                self.num_repeated += len(batch.records) - len(new)
                self.batches.append(batch)
                self.records += new
                self.arrived.notify_all()
            if self.acknowledges:
                yield pb.Ack(seq=batch.records[-1].seq)

    def start(self) -> Server:
        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        telemetry_pb2_grpc.add_TelemetryServicer_to_server(self, self._grpc)
        self._grpc.add_insecure_port(f"unix:{daemon_socket()}")
        self._grpc.start()
        return self

    def stop(self) -> None:
        if self._grpc is not None:
            self._grpc.stop(None).wait()
            self._grpc = None

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, 120), f"only {len(self.records)} records came"

    def of(self, body: str) -> list[pb.Record]:
        return [record for record in self.records if record.WhichOneof("body") == body]

    def steps(self) -> list[int]:
        return [record.step.step for record in self.of("step")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(folder))
    found = RunFolder(folder / "run-1")
    found.create()
    yield found
    for left in list(source_module._live):
        left.close(1)
    shutil.rmtree(folder)


@pytest.fixture
def server(run: RunFolder) -> Iterator[Server]:
    found = Server().start()
    yield found
    found.stop()


def test_every_record_arrives_once_and_in_order(run: RunFolder, server: Server) -> None:
    source = open_source(1, 1, 2, run, FAST)
    source.rank_started("cpu", "a processor", 123, peak_flops=1e12)
    for step in range(1, 401):
        token = source.collective_begin("world", "all_reduce", "float32", 4 * step, 2)
        source.waiting(token)
        source.collective_end(token)
        source.blocked(token, 0.25)
        source.waiting(None)
        source.step(step=step, step_s=0.5, loss=1.0 / step, tokens=64, micro_batches=2)
        if step % 100 == 0:
            source.event("warning", "overflow", "scale halved", scale=2.0)
            source.metrics(step, {"accuracy": 0.5, "late": lambda: 2})
    unfinished = source.collective_begin("world", "barrier", "uint8", 0, 2)
    source.close(0)
    assert [record.seq for record in server.records] == list(range(1, len(server.records) + 1))
    assert server.num_repeated == 0 and server.batches[-1].dropped == 0
    assert server.steps() == list(range(1, 401))
    collectives = [record.collective for record in server.of("collective")]
    assert [collective.seq for collective in collectives] == list(range(1, unfinished + 1))
    assert all(c.bytes == 4 * c.seq and c.blocked_s == 0.25 and c.finished_s >= c.enqueued_s for c in collectives[:-1])
    assert collectives[-1].op == "barrier" and not collectives[-1].HasField("finished_s")
    assert [record.event.attributes["scale"] for record in server.of("event")] == ["2.0"] * 4
    assert [dict(record.metrics.values) for record in server.of("metrics")] == [{"accuracy": 0.5, "late": 2.0}] * 4
    started, last = server.of("rank_started")[0].rank_started, server.records[-1]
    assert (started.world_size, started.local_rank, started.device, started.peak_flops) == (2, 1, "cpu", 1e12)
    assert last.WhichOneof("body") == "rank_finished" and last.rank_finished.exit_status == 0
    batch = server.batches[0]
    assert (batch.run_id, batch.run_dir) == ("run-1", str(run.path))
    assert (batch.source.rank, batch.source.pid) == (1, os.getpid())
    assert len(server.batches) < len(server.records)


def test_absent_fields_stay_absent_and_callables_are_called_on_the_side_thread(run: RunFolder, server: Server) -> None:
    threads: list[str] = []

    def loss() -> float:
        threads.append(threading.current_thread().name)
        return 3.5

    source = open_source(0, 0, 1, run, FAST)
    source.step(step=1, step_s=0.1)
    source.step(step=2, step_s=0.1, loss=loss, grad_norm=lambda: None)
    source.close(0)
    first, second = (record.step for record in server.of("step"))
    assert not any(first.HasField(name) for name in ("loss", "grad_norm", "learning_rate", "loss_scale", "flops"))
    assert second.loss == 3.5 and not second.HasField("grad_norm") and threads == ["distui-telemetry"]


def test_heartbeats_tell_where_the_main_thread_is_blocked(run: RunFolder, server: Server) -> None:
    source = open_source(0, 0, 2, run, FAST)
    source.step(step=7, step_s=0.1)
    source.phase("backward")
    token = source.collective_begin("data_parallel", "reduce_scatter", "float32", 8, 2)
    source.waiting(token)
    beats = lambda: [r.heartbeat for r in server.of("heartbeat") if r.heartbeat.waiting_in]  # noqa: E731
    server.wait_for(lambda: len(beats()) >= 2)
    beat = beats()[-1]
    assert (beat.step, beat.phase, beat.waiting_in) == (7, "backward", "reduce_scatter data_parallel#1")
    assert dict(beat.last_seq) == {"data_parallel": 1} and beat.waiting_since_s >= beat.phase_since_s > 0


def test_memory_is_the_engine_s_and_the_process_s(run: RunFolder, server: Server) -> None:
    source = open_source(0, 0, 1, run, FAST)
    source.memory({"parameters": 100, "gradients": 50}, peak_allocated_bytes=200)
    source.close(0)
    memory = server.of("memory")[-1].memory
    assert dict(memory.by_category_bytes) == {"parameters": 100, "gradients": 50}
    assert memory.peak_rss_bytes >= memory.rss_bytes > 1 << 20
    assert memory.peak_allocated_bytes == 200 and not memory.HasField("allocated_bytes")


def test_what_was_not_acknowledged_is_sent_again(run: RunFolder) -> None:
    deaf = Server()
    deaf.acknowledges = False
    deaf.start()
    source = open_source(0, 0, 1, run, FAST)
    for step in range(1, 101):
        source.step(step=step, step_s=0.1)
    deaf.wait_for(lambda: len(deaf.steps()) == 100)
    deaf.stop()
    for step in range(101, 201):
        source.step(step=step, step_s=0.1)
    server = Server().start()
    source.close(0)
    server.stop()
    assert server.steps() == list(range(1, 201)) and server.records[0].seq == 1
    assert server.batches[-1].dropped == 0


def test_a_killed_and_restarted_server_gets_the_exact_count(run: RunFolder, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ack_server", Path(__file__).with_name("ack_server.py"))
    assert spec is not None and spec.loader is not None
    ack_server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ack_server)
    kept = tmp_path / "kept"

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(ack_server.__file__), str(daemon_socket()), str(kept)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.stdout.close()
        return process

    source = open_source(0, 0, 1, run, FAST)
    step = 0
    for _ in range(3):
        process = start()
        size = kept.stat().st_size if kept.exists() else 0
        while not kept.exists() or kept.stat().st_size < size + 2000:  # dies in the middle of its work
            step += 1
            source.step(step=step, step_s=0.1)
            time.sleep(0.001)
        process.kill()
        process.wait()
        for _ in range(50):
            step += 1
            source.step(step=step, step_s=0.1)
    process = start()
    source.close(0)
    process.kill()
    process.wait()
    seqs: dict[int, pb.Record] = {}
    for batch in ack_server.read(str(kept)):
        for record in batch.records:
            assert seqs.setdefault(record.seq, record) == record
    assert sorted(seqs) == list(range(1, len(seqs) + 1))
    assert [seqs[seq].step.step for seq in sorted(seqs) if seqs[seq].HasField("step")] == list(range(1, step + 1))


def test_a_full_ring_loses_the_oldest_and_counts_them(run: RunFolder, server: Server) -> None:
    slow = TelemetrySection(flush_s=60, heartbeat_s=60, ring_size=16)
    source = open_source(0, 0, 1, run, slow)
    server.wait_for(lambda: len(server.records) > 0)
    for step in range(1, 1001):
        source.step(step=step, step_s=0.1)
        source.collective_end(source.collective_begin("world", "all_reduce", "float32", 4, 2))
    source.close(0)
    dropped = server.batches[-1].dropped
    assert dropped > 0 and server.steps()[-1] == 1000
    assert len(server.steps()) + len(server.of("collective")) + dropped == 2000
    assert server.records[-1].seq == len(server.records) + dropped  # the gaps in the numbers are what was dropped


def test_fields_that_cannot_be_sent_are_counted_and_told_once(run: RunFolder, server: Server) -> None:
    source = open_source(0, 0, 1, run, FAST)
    for step in range(1, 4):
        source.step(step=step, step_s=0.1, loss="much")  # type: ignore[arg-type]
    source.step(step=4, step_s=0.1, loss=lambda: 1 / 0)
    source.step(step=5, step_s=0.1)
    source.close(0)
    assert server.steps() == [5] and server.batches[-1].dropped == 4
    (event,) = [record.event for record in server.of("event")]
    assert "ValueError" in event.message and "'much'" in event.message


def test_a_ledger_that_cannot_be_made_costs_the_job_nothing(
    run: RunFolder, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    run.ledger.rmdir()
    run.ledger.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        source = open_source(0, 0, 1, run, FAST)
    source.collective_end(source.collective_begin("world", "all_reduce", "float32", 4, 2))
    source.close(0)
    assert len(server.of("collective")) == 1 and "in memory only" in caplog.text
    assert "cannot be kept" in server.of("event")[0].event.message


def test_several_engines_share_the_source_and_the_last_one_ends_it(run: RunFolder, server: Server) -> None:
    first, second = open_source(0, 0, 1, run, FAST), open_source(0, 0, 1, run, FAST)
    assert first is second is current() and first.active
    first.close(0)
    second.step(step=1, step_s=0.1)
    second.close(0)
    second.close(0)
    assert server.steps() == [1] and len(server.of("rank_finished")) == 1 and not second.active
    again = open_source(0, 0, 1, run, FAST)
    assert again is not first and again.active
    again.close(3, "RuntimeError: no")
    assert again._ledger.buffer[:8] == b"DISTUILG"
    with LedgerReader.open(run.rank_ledger(0)) as reader:
        assert reader.state().exit_status == 3


@pytest.mark.parametrize("off", ["no run", "disabled"])
def test_without_a_run_nothing_happens(run: RunFolder, off: str) -> None:
    enabled = TelemetrySection(enabled=off == "no run")
    source = open_source(0, 0, 1, None if off == "no run" else run, enabled)
    assert isinstance(source, NullSource) and source is current() and not source.active
    source.rank_started("cpu", "", 0)
    source.step(step=1, step_s=1.0)
    source.memory({})
    source.phase("data")
    token = source.collective_begin("world", "barrier", "uint8", 0, 1)
    source.waiting(token)
    source.collective_started(token, 1.0)
    source.collective_end(token)
    source.blocked(token, 1.0)
    source.event("info", "note", "")
    source.metrics(1, {})
    source.on_control("stop", lambda command: None)
    source.close(0)
    assert not run.rank_ledger(0).exists() and token == 0


def test_collectives_can_be_left_out(run: RunFolder, server: Server) -> None:
    source = open_source(0, 0, 1, run, TelemetrySection(flush_s=0.02, collectives=False))
    token = source.collective_begin("world", "barrier", "uint8", 0, 1)
    source.waiting(token)
    source.collective_end(token)
    source.step(step=1, step_s=0.1)
    source.close(0)
    assert server.steps() == [1] and not server.of("collective")


def script(text: str, run: RunFolder) -> subprocess.CompletedProcess[str]:
    opening = """
        import sys
        from pathlib import Path
        from distui.core.config.schema import TelemetrySection
        from distui.core.paths import RunFolder
        from distui.core.telemetry.source import current, open_source
        run = RunFolder(Path(sys.argv[1]))
        source = open_source(0, 0, 1, run, TelemetrySection(flush_s=0.02, heartbeat_s=0.1))
    """
    command = [sys.executable, "-c", textwrap.dedent(opening) + textwrap.dedent(text), str(run.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_a_daemon_that_never_answers_does_not_hold_up_the_end(run: RunFolder, server: Server) -> None:
    server.acknowledges = False
    done = script("source.step(step=1, step_s=0.1)\nsource.close(0)", run)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.steps() == [1]
    left = [record for batch in unsent_batches(run) for record in batch.records]
    assert [record.step.step for record in left if record.HasField("step")] == [1]
    assert left[-1].HasField("rank_finished") and unsent_batches(run)[-1].last


def test_a_forked_child_is_silent_and_ends(run: RunFolder, server: Server) -> None:
    done = script(
        """
        import multiprocessing, os, threading
        source.step(step=1, step_s=0.1)
        while source._sender._stream is None or not source._sender._stream.acknowledged:
            threading.Event().wait(0.01)
        token = source.collective_begin("world", "all_reduce", "float32", 4, 2)

        def work():
            assert not source.active and current() is source
            for step in range(100, 200):
                source.step(step=step, step_s=0.1)
                source.collective_begin("world", "all_gather", "float32", 4, 2)
            source.phase("child")
            source.event("error", "child", "must not be heard")
            source.collective_end(token)
            source.close(1)

        children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
            assert child.exitcode == 0, child.exitcode
        forked = os.fork()
        if forked == 0:
            sys.exit(5)  # through the interpreter's own end, atexit included
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 5
        source.phase("data")
        source.step(step=2, step_s=0.1)
        source.close(0)
        """,
        run,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert server.steps() == [1, 2] and not server.of("event")
    (collective,) = server.of("collective")
    assert collective.collective.op == "all_reduce" and not collective.collective.HasField("finished_s")
    assert len(server.of("rank_finished")) == 1 and server.of("rank_finished")[0].rank_finished.exit_status == 0


def test_a_script_that_closes_nothing_loses_nothing(run: RunFolder, server: Server) -> None:
    done = script("source.step(step=1, step_s=0.1)", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.steps() == [1] and not server.of("rank_finished")
