"""What telemetry costs the training thread, in microseconds, with the sender live against a server process.

    python benchmarks/telemetry/steps.py [--batches 60] [--batch 500]

The goal is under 10 us each. A bare deque append with a time stamp is measured in the same run, as the least that any
such thing can cost. Calls come at a real job's pace (a batch, then a pause), so the sender drains while it is measured.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder, daemon_socket
from distui.core.telemetry.source import NullSource, TelemetrySource, open_source

GOAL_US = 10.0


def serve() -> None:
    """Acknowledge all batches on the daemon's socket until SIGTERM; print how many records came."""
    import grpc

    from distui.proto import telemetry_pb2 as pb
    from distui.proto import telemetry_pb2_grpc

    num_records = 0
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread, or sigwait does not get it

    class Telemetry(telemetry_pb2_grpc.TelemetryServicer):
        def Publish(self, batches: Iterator[pb.Batch], context: grpc.ServicerContext) -> Iterator[pb.Ack]:
            nonlocal num_records
            for batch in batches:
                num_records += len(batch.records)
                yield pb.Ack(seq=batch.records[-1].seq)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    telemetry_pb2_grpc.add_TelemetryServicer_to_server(Telemetry(), server)
    server.add_insecure_port(f"unix:{daemon_socket()}")
    server.start()
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    server.stop(1.0).wait()
    print(num_records, flush=True)


def measure(call: Callable[[int], None], num_batches: int, batch: int, pause_s: float) -> tuple[float, float]:
    """Return the median and the 95th percentile over batches of the time of one call, in microseconds."""
    pause = threading.Event()
    times = []
    number = 0
    for _ in range(num_batches):
        began = time.perf_counter()
        for _ in range(batch):
            number += 1
            call(number)
        times.append((time.perf_counter() - began) / batch * 1e6)
        pause.wait(pause_s)
    return statistics.median(times), statistics.quantiles(times, n=20)[18]


def cases(source: TelemetrySource) -> dict[str, Callable[[int], None]]:
    """Return what is measured by its name in the table."""
    bare: deque[tuple[float, int]] = deque(maxlen=16384)
    null = NullSource()

    def append(number: int) -> None:
        bare.append((time.time(), number))

    def step_of(into: TelemetrySource) -> Callable[[int], None]:
        def step(number: int) -> None:
            into.step(
                step=number,
                step_s=0.1,
                data_wait_s=0.01,
                forward_s=0.03,
                backward_s=0.04,
                exposed_comm_s=0.01,
                optimizer_s=0.01,
                tokens=4096,
                samples=8,
                loss=2.5,
                grad_norm=1.0,
                learning_rate=1e-3,
                flops=1e12,
            )

        return step

    def collective(number: int) -> None:
        source.collective_end(source.collective_begin("data_parallel", "reduce_scatter", "float32", 1 << 20, 8))

    def waited(number: int) -> None:
        token = source.collective_begin("data_parallel", "all_gather", "float32", 1 << 20, 8)
        source.waiting(token)
        source.collective_end(token)
        source.blocked(token, 1e-4)
        source.waiting(None)

    return {
        "bare deque append + time()": append,
        "step()": step_of(source),
        "collective_begin + _end": collective,
        "the same + waiting, blocked": waited,
        "phase()": lambda number: source.phase("forward"),
        "step() of a NullSource": step_of(null),
    }


def main() -> int:
    """Print the table; return 1 where a step or a collective misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--pause-s", type=float, default=0.02)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        os.environ["DISTUI_RUNTIME_DIR"] = folder
        command = [sys.executable, __file__, "--serve"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        server.stdout.readline()
        run = RunFolder(Path(folder) / "runs" / "benchmark")
        run.create()
        # A ring that holds a batch of each: what is measured is the cost, not the loss.
        source = open_source(0, 0, 8, run, TelemetrySection(flush_s=0.1))
        source.rank_started("cpu", "benchmark", 1)
        missed = False
        print(f"{'on the training thread':32} {'median us':>10} {'p95 us':>8}")
        for name, call in cases(source).items():
            median, late = measure(call, options.batches, options.batch, options.pause_s)
            bounded = name.startswith(("step()", "collective")) and "Null" not in name
            missed |= bounded and median >= GOAL_US
            print(f"{name:32} {median:10.2f} {late:8.2f}{f'   goal < {GOAL_US:g}' if bounded else ''}")
        sender = source._sender
        source.close(0)
        server.terminate()
        received, _ = server.communicate(timeout=10)
    print(f"the server received {int(received):,} records; {sender.dropped():,} were dropped")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
