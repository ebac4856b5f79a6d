"""Provokes each fault with real gloo ranks and a real daemon, and says what the daemon says of it, and when.

    python benchmarks/faults.py [FAULT ...]       the matrix of docs/diagnosis.md, as Markdown
    python benchmarks/faults.py --healthy 300     a run of so many seconds with pauses: any verdict is a false alarm

The time is from the fault to the first answer of the daemon that names it. slow_link, memory_killed and disk_full need
root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from distui.core.errors import DaemonUnavailable
from distui.core.paths import RunFolder, daemon_socket, default_runs_dir
from distui.daemon.spawn import ensure_daemon
from distui.daemon.store import read_batches
from distui.launcher.daemon_client import get_snapshot
from distui.launcher.daemon_keeper import DaemonKeeper
from distui.proto import telemetry_pb2 as pb

EXPECTED = {
    "asleep": ("hang", 6.0),
    "stopped": ("hang", 6.0),
    "holding_the_gil": ("hang", 6.0),
    "killed": ("dead_rank", 1.0),
    "memory_error": ("out_of_memory", 1.0),
    "memory_killed": ("out_of_memory", 1.0),
    "operation": ("mismatch", 6.0),
    "size": ("mismatch", 6.0),
    "order": ("hang", 6.0),
    "straggler": ("straggler", 20.0),
    "slow_link": ("slow_link", 20.0),
    "data_stall": ("data_stall", 6.0),
    "nan_loss": ("nan_loss", 2.0),
    "disk_full": ("disk_full", 2.0),
}
"""The verdict on each fault, and the goal for its time."""
DAEMON_KILLED = "daemon_killed"
DAEMON_GOAL_S = 6.0
MIN_STEPS = 30
POLL_S = 0.1
LIMIT_S = 40.0
NEEDS_ROOT = frozenset({"slow_link", "memory_killed", "disk_full"})
WORLD = 3


class Bench:
    """A daemon of its own, and the warm process that jobs are forked from."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
        os.environ["DISTUI_STATE_DIR"] = str(self.folder / "state")
        os.environ["DISTUI_RUNTIME_DIR"] = str(self.folder / "rt")
        ensure_daemon()
        script = Path(__file__).with_name("faulty_ranks.py")
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.ranks = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, text=True, env=environ)
        self.mounts: list[Path] = []

    def start(self, fault: str, world: int = WORLD) -> RunFolder:
        """Start a job with a fault."""
        folder = default_runs_dir()
        if fault == "disk_full":
            folder = self.folder / "small"
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
            self.mounts.append(folder)
        run = RunFolder(folder / f"{fault}-{time.time_ns()}")
        run.create()
        spec = {"run_id": run.run_id, "name": fault, "strategy": "plain", "command": [fault], "world_size": world}
        run.spec.write_text(json.dumps({**spec, "num_nodes": 1, "started_s": time.time(), "config_toml": ""}))
        self._ask(run, fault, world)
        return run

    def end(self, run: RunFolder) -> None:
        """Kill a job."""
        self._ask(run, "end", 0)

    def _ask(self, run: RunFolder, fault: str, world: int) -> None:
        assert self.ranks.stdin is not None
        self.ranks.stdin.write(json.dumps({"run": str(run.path), "fault": fault, "world": world}) + "\n")
        self.ranks.stdin.flush()

    def snapshot(self, run: RunFolder) -> pb.Snapshot:
        """Return what the daemon says now."""
        return get_snapshot(daemon_socket(), str(run.path))

    def verdict(self, run: RunFolder, kind: str = "") -> tuple[float, pb.Diagnosis | None, str]:
        """Wait for the fault and the first verdict after it: seconds between, the verdict, a false alarm before.

        With `kind`, for the first of that kind: on a machine with much to do, another may come before.
        """
        limit_s = LIMIT_S
        until = time.monotonic() + limit_s
        early = ""
        fault_s = 0.0
        while time.monotonic() < until:
            if not fault_s and (run.path / "fault").exists():
                fault_s = float((run.path / "fault").read_text())
            found = self.snapshot(run).diagnosis
            if found and not fault_s and not (run.path / "fault").exists():
                early = f"{found[0].kind}: {found[0].message}"
            if found and fault_s and kind in ("", found[0].kind):
                return time.time() - fault_s, found[0], early
            time.sleep(POLL_S)
        return limit_s, None, early

    def kill_daemon(self, run: RunFolder) -> tuple[float, str]:
        """Kill -9 the daemon of a job in the midst of it, which is kept as `distui launch` keeps it.

        Returns: the seconds until a new one has said so and knows of a later step of every rank; what it says.
        """
        until = time.monotonic() + LIMIT_S
        while min((rank.step for rank in self.snapshot(run).ranks), default=0) < MIN_STEPS:
            time.sleep(POLL_S)
        before = self.snapshot(run)
        os.kill(int((self.folder / "rt" / "daemon.lock").read_text()), 9)
        killed_s = time.time()
        with DaemonKeeper(daemon_socket()):
            while time.monotonic() < until:
                time.sleep(POLL_S)
                try:
                    now = self.snapshot(run)
                except DaemonUnavailable:
                    continue
                later = all(new.step > old.step for new, old in zip(now.ranks, before.ranks, strict=True))
                told = [
                    record.event.message
                    for batch in read_batches(run)
                    for record in batch.records
                    if record.event.kind == "daemon_restarted"
                ]
                if told and later:
                    return time.time() - killed_s, f"{told[0]} (event); {now.dropped} records lost; the job goes on"
        return LIMIT_S, ""

    def close(self) -> None:
        """End the jobs and the daemon."""
        assert self.ranks.stdin is not None
        self.ranks.stdin.close()
        self.ranks.wait(20)
        pid = int((self.folder / "rt" / "daemon.lock").read_text())
        os.kill(pid, 15)
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.05)
        for mount in self.mounts:
            subprocess.run(["umount", "-l", str(mount)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def matrix(bench: Bench, faults: list[str]) -> int:
    """Print the table; return how many goals were missed."""
    missed = 0
    print("| fault | verdict | ranks | after | goal | what it says |\n|---|---|---|---|---|---|", flush=True)
    for fault in faults:
        if fault == DAEMON_KILLED:
            run = bench.start("pauses")
            seconds, told = bench.kill_daemon(run)
            bench.end(run)
            missed += seconds > DAEMON_GOAL_S
            print(f"| {fault} | none |  | {seconds:.1f} s | {DAEMON_GOAL_S:g} s | {told or 'nothing'} |", flush=True)
            continue
        kind, goal_s = EXPECTED[fault]
        run = bench.start(fault)
        seconds, found, early = bench.verdict(run)
        bench.end(run)
        good = found is not None and found.kind == kind and seconds <= goal_s and not early
        missed += not good
        ranks = ",".join(map(str, found.ranks)) if found else ""
        told = found.message if found else f"nothing within {LIMIT_S:g} s"
        mark = "" if good else f" **missed**{f' (before: {early})' if early else ''}"
        print(
            f"| {fault} | {found.kind if found else 'none'} | {ranks} | {seconds:.1f} s{mark} | {goal_s:g} s | {told} |"
        )
        sys.stdout.flush()
    return missed


def healthy(bench: Bench, seconds: float) -> int:
    """Run a job with pauses for so long; print and count what the daemon says of it."""
    run = bench.start("pauses")
    began = time.monotonic()
    alarms: dict[str, str] = {}
    newest = 0
    while time.monotonic() - began < seconds:
        snapshot = bench.snapshot(run)
        for found in snapshot.diagnosis:
            alarms.setdefault(f"{found.kind}", f"after {time.monotonic() - began:.0f} s: {found.message}")
        newest = max([newest, *(rank.step for rank in snapshot.ranks)])
        time.sleep(0.5)
    print(f"{seconds:.0f} s, {newest:,} steps with three pauses of 6 s: {len(alarms)} false alarms")
    for kind, text in alarms.items():
        print(f"  {kind} {text}")
    return len(alarms)


def main() -> int:
    """Return 1 where a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*EXPECTED, DAEMON_KILLED, []], metavar="FAULT")
    parser.add_argument("--healthy", type=float, metavar="SECONDS")
    options = parser.parse_args()
    bench = Bench()
    try:
        missed = (
            healthy(bench, options.healthy)
            if options.healthy
            else matrix(bench, options.faults or [*EXPECTED, DAEMON_KILLED])
        )
    finally:
        bench.close()
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
