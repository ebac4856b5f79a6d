"""What tests and benchmarks of the daemon share: a node with a daemon process, and ranks that are made up."""

from __future__ import annotations

import json
import os
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from distui.core.paths import RunFolder, daemon_socket, default_runs_dir
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

DEADLINE_S = 120.0


def channel() -> grpc.Channel:
    """Open a channel to the daemon."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    return grpc.insecure_channel(f"unix:{daemon_socket()}", options=options)


class Node:
    """A node: its daemon, its runs, its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemon: subprocess.Popen[bytes] | None = None
        self.processes: list[subprocess.Popen[str]] = []
        self._channel: grpc.Channel | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the daemon and wait until it answers."""
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "distui.daemon", "--ready-fd", str(writer), *arguments]
        with open(self.folder / "daemon.log", "ab") as log:
            self.daemon = subprocess.Popen(command, pass_fds=[writer], stdout=log, stderr=log, cwd="/")
        os.close(writer)
        with open(reader, "rb") as ready:
            assert ready.readline(), (self.folder / "daemon.log").read_text()
        return self.daemon

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> int:
        """End the daemon by a signal; return its exit status."""
        assert self.daemon is not None
        self.daemon.send_signal(signum)
        status, self.daemon = self.daemon.wait(DEADLINE_S), None
        return status

    def run(self, name: str = "train-1", world_size: int = 2, **spec: object) -> RunFolder:
        """Make a run's folder, as the launcher does."""
        run = RunFolder(default_runs_dir() / name)
        run.create()
        fields = {"run_id": name, "name": "train", "strategy": "ZeRO-2, bf16", "command": ["train.py"]}
        more = {"world_size": world_size, "num_nodes": 1, "started_s": time.time(), "config_toml": ""}
        run.spec.write_text(json.dumps({**fields, **more, **spec}))
        return run

    def process(self, *command: str) -> subprocess.Popen[str]:
        """Start a process that ends with the test."""
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    @property
    def monitor(self) -> rpc.MonitorStub:
        """The Monitor service."""
        self._channel = self._channel or channel()
        return rpc.MonitorStub(self._channel)

    @property
    def control(self) -> rpc.ControlStub:
        """The Control service."""
        self._channel = self._channel or channel()
        return rpc.ControlStub(self._channel)

    def snapshot(self, run: RunFolder) -> pb.Snapshot:
        """Return the daemon's snapshot."""
        request = pb.SnapshotRequest(run_id=run.run_id)
        found: pb.Snapshot = self.monitor.GetSnapshot(request, timeout=DEADLINE_S, wait_for_ready=True)
        return found

    def wait(self, run: RunFolder, condition: Callable[[pb.Snapshot], object]) -> pb.Snapshot:
        """Watch the run until `condition` holds; return the snapshot in which it does."""
        request = pb.WatchRequest(run_id=run.run_id, interval_s=0.05)
        last = pb.Snapshot()
        stream = self.monitor.Watch(request, timeout=DEADLINE_S)
        try:
            for update in stream:
                last = update.snapshot
                if condition(last):
                    return last
        except grpc.RpcError as error:
            raise AssertionError(f"it did not come to that: {last}") from error
        finally:
            stream.cancel()
        raise AssertionError(f"the run ended before: {last}")

    def close(self) -> None:
        """End everything that was started."""
        if self._channel is not None:
            self._channel.close()
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        if self.daemon is not None:
            self.kill()


class SimulatedRank:
    """One source of a run: builds records as a rank does, and publishes them over the daemon's real socket."""

    def __init__(self, run: RunFolder, rank: int, *, pid: int | None = None, world_size: int = 2) -> None:
        self.run, self.world_size = run, world_size
        self.source = pb.Source(
            rank=rank, node=sockets.gethostname(), pid=pid or os.getpid(), incarnation=time.time_ns()
        )
        self.records: list[pb.Record] = []
        self.seq = 0
        self.dropped = 0

    def add(self, time_s: float | None = None, **body: object) -> SimulatedRank:
        """Add a record; `body` is one field of the message Record."""
        self.seq += 1
        record = pb.Record(seq=self.seq, time_s=time.time() if time_s is None else time_s, **body)  # type: ignore[arg-type]
        self.records.append(record)
        return self

    def started(self, **fields: object) -> SimulatedRank:
        """Add RankStarted."""
        body = pb.RankStarted(world_size=self.world_size, device="cpu", device_name="a processor", **fields)  # type: ignore[arg-type]
        return self.add(rank_started=body)

    def steps(self, first: int, last: int, step_s: float = 0.1, **fields: object) -> SimulatedRank:
        """Add steps `first` to `last`."""
        for step in range(first, last + 1):
            body = {"loss": 4.0 / step, "tokens": 100, **fields}
            self.add(step=pb.Step(step=step, step_s=step_s, **body))  # type: ignore[arg-type]
        return self

    def beat(self, *, time_s: float | None = None, **fields: object) -> SimulatedRank:
        """Add a heartbeat."""
        return self.add(time_s, heartbeat=pb.Heartbeat(**fields))  # type: ignore[arg-type]

    def batch(self) -> pb.Batch:
        """Return all records as one batch."""
        return pb.Batch(
            run_id=self.run.run_id,
            run_dir=str(self.run.path),
            source=self.source,
            records=self.records,
            dropped=self.dropped,
        )

    def publish(self, *, keep: bool = False, close: bool = False) -> int:
        """Send the records and return what was acknowledged; with `keep` they are sent again the next time.

        The stream is cut, as by a process that is killed; with `close` it is ended as a rank does at its end.
        """
        batch = self.batch()
        batch.last = close
        acked = publish([batch], cut=not close)[-1]
        if not keep:
            self.records.clear()
        return acked


def publish(batches: list[pb.Batch], *, cut: bool = False) -> list[int]:
    """Send batches on one stream and end it, or `cut` it when all is acknowledged; return the acknowledgements."""
    acknowledged = threading.Event()

    def requests() -> Iterator[pb.Batch]:
        yield from batches
        if cut:
            acknowledged.wait(DEADLINE_S)

    with channel() as open_channel:
        call = rpc.TelemetryStub(open_channel).Publish(requests(), timeout=DEADLINE_S, wait_for_ready=True)
        acks = []
        for ack in call:
            acks.append(ack.seq)
            if cut and len(acks) == len(batches):
                call.cancel()
                break
        acknowledged.set()
        return acks
