"""What recording a collective costs the thread that starts it, in microseconds of its CPU time.

    python benchmarks/telemetry/ledger.py [--rounds 40] [--calls 200]

One gloo rank alone, so that a collective does nothing. Recorded and unrecorded calls alternate in rounds of one run,
and the median of the rounds' differences is the cost. The goal is under 10 us for what Python starts. What C++ code
starts (DDP's reducer) goes through a Python kernel in the dispatcher, put in only once DDP is used, and costs more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry import collectives
from distui.core.telemetry.source import open_source

GOAL_US = 10.0


def timed(call: Callable[[], object], num_calls: int) -> float:
    """Return the thread's CPU time of one call. Units: microseconds."""
    began = time.thread_time()
    for _ in range(num_calls):
        call()
    return (time.thread_time() - began) / num_calls * 1e6


def cost(call: Callable[[], object], rounds: int, num_calls: int) -> tuple[float, float]:
    """Return the cost of a call unrecorded, and what recording adds; medians over rounds that alternate."""
    bare, added = [], []
    for _ in range(rounds):
        collectives.quiet.on = True
        without = timed(call, num_calls)
        collectives.quiet.on = False
        bare.append(without)
        added.append(timed(call, num_calls) - without)
    return statistics.median(bare), statistics.median(added)


def main() -> int:
    """Print the table; return 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = False
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as folder:
        run = RunFolder(Path(folder) / "run")
        run.create()
        source = open_source(0, 0, 1, run, TelemetrySection())
        collectives.install()
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        tensor, gathered = torch.ones(4), torch.ones(4)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(tensor),
            "all_gather": lambda: dist.all_gather([gathered], tensor),
            "barrier": lambda: dist.barrier(),
            "all_reduce, async, with its future": lambda: dist.all_reduce(tensor, async_op=True).wait(),
        }
        print(f"{'started by':36} {'bare us':>8} {'recording adds us':>18}")
        for name, call in calls.items():
            bare, added = cost(call, options.rounds, options.calls)
            sync = "future" not in name
            missed |= sync and added >= GOAL_US
            print(f"{name:36} {bare:8.1f} {added:18.1f}{f'   goal < {GOAL_US:g}' if sync else ''}")
        collectives.install_dispatched()
        bare_s, added_s = cost(calls["all_reduce"], options.rounds, options.calls)
        print(f"{'all_reduce, once DDP is in use':36} {bare_s:8.1f} {added_s:18.1f}   (the kernel is in both)")
        dist.destroy_process_group()
        source.close(0)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
