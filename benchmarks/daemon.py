"""What the daemon costs: CPU and memory under simulated ranks that send steps, collectives and heartbeats.

python benchmarks/daemon.py --ranks 8 --hz 10 --seconds 20
python benchmarks/daemon.py --runs 9000     beside so many runs that have ended: how long the 20 newest take to list
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket as sockets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import psutil

from distui.core.paths import RunFolder
from distui.daemon.node.spawn import ensure_daemon
from distui.launcher.job.outcome import Outcome
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

COLLECTIVES_PER_STEP = 4
FLUSH_S = 0.5
WARM_UP_S = 3.0


def batches(
    run: RunFolder, rank: int, world_size: int, hz: float, until: float, pace: dict[int, float]
) -> Iterator[pb.Batch]:
    """Yield what a rank sends at each flush until `until` (monotonic seconds); `pace` is what the daemon asks for."""
    source = pb.Source(rank=rank, node=sockets.gethostname(), pid=os.getpid(), incarnation=time.time_ns())
    seq, done, began = 0, 0, time.monotonic()
    pause = threading.Event()
    while (now := time.monotonic()) < until:
        batch = pb.Batch(run_id=run.run_id, run_dir=str(run.path), source=source)
        due = int((now - began) * hz)
        time_s = time.time()
        for step in range(done + 1, due + 1):
            for index in range(COLLECTIVES_PER_STEP):
                number = (step - 1) * COLLECTIVES_PER_STEP + index + 1
                collective = pb.Collective(
                    group="data_parallel",
                    seq=number,
                    op="all_reduce",
                    dtype="float32",
                    bytes=1 << 22,
                    enqueued_s=time_s,
                    finished_s=time_s + 0.002,
                    group_size=world_size,
                )
                seq += 1
                batch.records.add(seq=seq, time_s=time_s, collective=collective)
            seq += 1
            body = pb.Step(step=step, step_s=1 / hz, forward_s=0.3 / hz, backward_s=0.6 / hz, tokens=4096, loss=2.0)
            batch.records.add(seq=seq, time_s=time_s, step=body)
        done = max(done, due)
        seq += 2
        beat = pb.Heartbeat(step=done, phase="forward", last_seq={"data_parallel": done * COLLECTIVES_PER_STEP})
        batch.records.add(seq=seq - 1, time_s=time_s, heartbeat=beat)
        batch.records.add(seq=seq, time_s=time_s, memory=pb.Memory(allocated_bytes=1 << 30))
        yield batch
        period_s = max(FLUSH_S, pace.get(rank, 0.0))
        pause.wait(period_s - time.time() % period_s)


def publish(socket: Path, source: Iterator[pb.Batch], counts: list[int], rank: int, pace: dict[int, float]) -> None:
    """Send a rank's batches and count its records that were acknowledged."""
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        last = 0
        for ack in rpc.TelemetryStub(channel).Publish(source):
            last, pace[rank] = ack.seq, ack.flush_s
        counts.append(last)


def measure(num_ranks: int, hz: float, seconds: float) -> dict[str, float]:
    """Return the daemon's cost while `num_ranks` send `hz` steps a second each."""
    socket = ensure_daemon()
    run = RunFolder(Path(os.environ["DISTUI_STATE_DIR"]) / "runs" / "bench-1")
    run.create()
    run.spec.write_text(json.dumps({"run_id": run.run_id, "world_size": num_ranks, "started_s": time.time()}))
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        process = psutil.Process(rpc.MonitorStub(channel).GetDaemonInfo(pb.DaemonInfoRequest()).pid)
    try:
        counts: list[int] = []
        pace: dict[int, float] = {}
        until = time.monotonic() + seconds + WARM_UP_S
        threads = [
            threading.Thread(
                target=publish, args=(socket, batches(run, rank, num_ranks, hz, until, pace), counts, rank, pace)
            )
            for rank in range(num_ranks)
        ]
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP_S)  # opening the streams is not what is measured
        before, began = process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, took_s = process.cpu_times(), time.monotonic() - began
        for thread in threads:
            thread.join()
        cpu_s = after.user + after.system - before.user - before.system
        size = sum(path.stat().st_size for path in run.telemetry.iterdir())
        return {
            "ranks": num_ranks,
            "steps_per_s": hz,
            "records_per_s": sum(counts) / (seconds + WARM_UP_S),
            "cpu_percent_of_a_core": 100 * cpu_s / took_s,
            "cpu_us_per_record": 1e6 * cpu_s / took_s / max(1, sum(counts)) * (seconds + WARM_UP_S),
            "disk_bytes_per_record": size / max(1, sum(counts)),
            "rss_bytes": process.memory_info().rss,
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def measure_list(num_runs: int, newest: int = 20, looks: int = 20) -> dict[str, float]:
    """Return how long the newest runs take to list: the first look, which reads all, and those after it."""
    began_s = time.time() - num_runs
    for index in range(num_runs):
        run = RunFolder(Path(os.environ["DISTUI_STATE_DIR"]) / "runs" / f"old-{index}")
        run.create()
        run.spec.write_text(json.dumps({"run_id": run.run_id, "world_size": 1, "started_s": began_s + index}))
        Outcome("finished", 0, "", began_s + index + 0.5).write(run)
    with grpc.insecure_channel(f"unix:{ensure_daemon()}") as channel:
        stub = rpc.MonitorStub(channel)
        process = psutil.Process(stub.GetDaemonInfo(pb.DaemonInfoRequest()).pid)
        try:
            took_ms = []
            for _ in range(looks + 1):
                began = time.monotonic()
                found = stub.ListRuns(pb.ListRunsRequest(limit=newest)).runs
                took_ms.append(1e3 * (time.monotonic() - began))
                assert [one.started_s for one in found] == [began_s + num_runs - 1 - at for at in range(newest)]
                assert {one.state for one in found} == {"finished"}
            return {"runs": num_runs, "first_ms": took_ms[0], "median_ms": statistics.median(took_ms[1:])}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def main() -> None:
    """Measure in folders of its own and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--runs", type=int, metavar="N")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    (folder / "r").mkdir(mode=0o700)
    os.environ.update(DISTUI_STATE_DIR=str(folder / "s"), DISTUI_RUNTIME_DIR=str(folder / "r"))
    try:
        done = measure_list(options.runs) if options.runs else measure(options.ranks, options.hz, options.seconds)
        print(json.dumps(done, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
