"""Provokes what can happen to a job, with real gloo ranks and a real daemon: what is said of it, and when.

    python benchmarks/faults.py [SITUATION ...]   the matrix of docs/diagnosis.md, as Markdown; all, where none is named
    python benchmarks/faults.py --load 20         the same beside so many busy processes
    python benchmarks/faults.py --healthy 300     a run of so many seconds with pauses: any verdict is a false alarm

The time is from the fault to the first answer of the daemon that names it; healthy jobs are watched for a while,
`--jobs` at a time. Some need root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from situations.job import SITUATIONS

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from distui.core.errors import DaemonUnavailable, UserError
from distui.core.paths import RunFolder, daemon_socket, default_runs_dir
from distui.daemon.node.spawn import ensure_daemon
from distui.daemon.runs.store import read_batches
from distui.launcher.job.daemon_client import get_snapshot
from distui.launcher.job.daemon_keeper import DaemonKeeper
from distui.proto import telemetry_pb2 as pb

DAEMON_KILLED = "daemon_killed"
DAEMON_GOAL_S = 6.0
MIN_STEPS = 30
POLL_S = 0.1
LIMIT_S = 40.0
START_S = 120.0
"""Until the fault: the first job waits for torch."""
SUSPENDED_S = 10.0


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

    def start(self, fault: str) -> RunFolder:
        """Start a job that something happens to."""
        folder = default_runs_dir()
        if fault == "disk_full":
            folder = self.folder / "small"
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
            self.mounts.append(folder)
        run = RunFolder(folder / f"{fault}-{time.time_ns()}")
        run.create()
        spec = {"run_id": run.run_id, "name": fault, "strategy": "plain", "command": [fault]}
        spec["world_size"] = SITUATIONS[fault].world
        run.spec.write_text(json.dumps({**spec, "num_nodes": 1, "started_s": time.time(), "config_toml": ""}))
        self.ask(run, fault)
        return run

    def end(self, run: RunFolder) -> None:
        """Kill a job."""
        self.ask(run, "end")

    def ask(self, run: RunFolder, what: str) -> None:
        """Have a job's ranks started, ended, stopped, or let go on."""
        assert self.ranks.stdin is not None
        self.ranks.stdin.write(json.dumps({"run": str(run.path), "fault": what}) + "\n")
        self.ranks.stdin.flush()

    def snapshot(self, run: RunFolder) -> pb.Snapshot:
        """Return what the daemon says now; nothing before it has heard of the run."""
        try:
            return get_snapshot(daemon_socket(), run.run_id, timeout_s=60.0)
        except UserError:
            return pb.Snapshot()

    def daemon_pid(self) -> int:
        """Return the process of the daemon."""
        return int((self.folder / "rt" / "daemon.lock").read_text())

    def happened_s(self, run: RunFolder) -> float:
        """Return when it happened, 0 where it has not. Units: Unix seconds."""
        path = run.path / "fault"
        return float(path.read_text()) if path.exists() else 0.0

    def verdict(
        self, run: RunFolder, kind: str = "", limit_s: float = LIMIT_S, words: str = ""
    ) -> tuple[float, pb.Diagnosis | None, str]:
        """Wait for the fault and the first verdict after it: seconds between, the verdict, a false alarm before.

        With `kind` and `words`, for the first such: on a machine with much to do, another may come before.
        """
        until = time.monotonic() + limit_s + START_S
        early = ""
        fault_s = 0.0
        while time.monotonic() < until:
            if not fault_s and (fault_s := self.happened_s(run)):
                until = time.monotonic() + limit_s
            found = self.snapshot(run).diagnosis
            if found and not fault_s and not self.happened_s(run):
                early = f"{found[0].kind}: {found[0].message}"
            if found and fault_s and kind in ("", found[0].kind) and words in found[0].message:
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
        os.kill(self.daemon_pid(), 9)
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
        pid = self.daemon_pid()
        os.kill(pid, 15)
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.05)
        for mount in self.mounts:
            subprocess.run(["umount", "-l", str(mount)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def matrix(bench: Bench, names: list[str]) -> int:
    """Print the table of sick jobs; return how many goals were missed."""
    missed = 0
    print("| situation | verdict | ranks | after | goal | what it says |\n|---|---|---|---|---|---|", flush=True)
    for name in names:
        if name == DAEMON_KILLED:
            run = bench.start("pauses")
            seconds, told = bench.kill_daemon(run)
            bench.end(run)
            missed += seconds > DAEMON_GOAL_S
            print(f"| {name} | none |  | {seconds:.1f} s | {DAEMON_GOAL_S:g} s | {told or 'nothing'} |", flush=True)
            continue
        right = SITUATIONS[name]
        run = bench.start(name)
        seconds, found, early = bench.verdict(run, limit_s=LIMIT_S + right.goal_s)
        bench.end(run)
        wrong = [] if found is not None else ["no verdict"]
        if found is not None:
            wrong += [f"not {right.kind}"] * (found.kind != right.kind)
            wrong += [f"not ranks {right.ranks}"] * (right.ranks != () and tuple(found.ranks) != right.ranks)
        wrong += ["late"] * (seconds > right.goal_s) + [f"before it: {early}"] * bool(early)
        missed += bool(wrong)
        ranks = ",".join(map(str, found.ranks)) if found else ""
        told = found.message if found else f"nothing within {LIMIT_S + right.goal_s:g} s"
        mark = f" **missed: {'; '.join(wrong)}**" if wrong else ""
        after = f"{seconds:.1f} s{mark} | {right.goal_s:g} s"
        print(f"| {name} | {found.kind if found else 'none'} | {ranks} | {after} | {told} |", flush=True)
    return missed


def watch_healthy(bench: Bench, names: list[str], jobs: int) -> int:
    """Print what is said of jobs that are well, `jobs` at a time; return of how many anything is said."""
    alarms: dict[str, str] = {}
    print("| healthy situation | watched for | steps | said of it |\n|---|---|---|---|", flush=True)
    for at in range(0, len(names), jobs):
        runs = {name: bench.start(name) for name in names[at : at + jobs]}
        while runs:
            for name, run in list(runs.items()):
                snapshot, since_s = bench.snapshot(run), bench.happened_s(run)
                for found in snapshot.diagnosis:
                    alarms.setdefault(
                        name, f"after {time.time() - (since_s or time.time()):.0f} s: {found.kind}: {found.message}"
                    )
                if name == "suspended" and since_s and not (run.path / "woken").exists():
                    _suspend(bench, run)
                if since_s and time.time() - since_s > SITUATIONS[name].goal_s:
                    steps = min((rank.step for rank in snapshot.ranks), default=0)
                    said = f"**{alarms[name]}**" if name in alarms else "nothing"
                    print(f"| {name} | {SITUATIONS[name].goal_s:g} s | {steps} | {said} |", flush=True)
                    bench.end(runs.pop(name))
            time.sleep(POLL_S)
    return len(alarms)


def _suspend(bench: Bench, run: RunFolder) -> None:
    """Stop ranks and daemon as a closed laptop does, and let them go on."""
    time.sleep(2.0)
    bench.ask(run, "stop")
    os.kill(bench.daemon_pid(), 19)
    time.sleep(SUSPENDED_S)
    bench.ask(run, "continue")
    os.kill(bench.daemon_pid(), 18)
    (run.path / "woken").touch()


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
    parser.add_argument("situations", nargs="*", choices=[*SITUATIONS, DAEMON_KILLED, []], metavar="SITUATION")
    parser.add_argument("--healthy", type=float, metavar="SECONDS", help="one run with pauses, for so long")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="beside so many busy processes")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="healthy jobs at a time")
    options = parser.parse_args()
    root = os.geteuid() == 0
    names = options.situations or [
        name for name, one in SITUATIONS.items() if name != "suspended" and (root or not one.needs_root)
    ]
    sick = [name for name in names if name == DAEMON_KILLED or SITUATIONS[name].kind]
    well = [name for name in names if name not in sick]
    if not options.situations:
        sick.append(DAEMON_KILLED)
        well.append("suspended")  # by itself: it stops the daemon
    with contextlib.ExitStack() as stack:
        bench = Bench()
        stack.callback(bench.close)
        for _ in range(options.load):
            stack.callback(_kill, subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        if options.healthy:
            return min(healthy(bench, options.healthy), 1)
        missed = matrix(bench, sick) if sick else 0
        alone = [name for name in well if name == "suspended"]
        beside = [name for name in well if name != "suspended"]
        alarms = watch_healthy(bench, beside, options.jobs) + watch_healthy(bench, alone, 1) if well else 0
        print(f"{len(sick)} sick: {len(sick) - missed} as they should be; {len(well)} healthy: {alarms} false alarms")
    return min(missed + alarms, 1)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
