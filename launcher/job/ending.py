"""What the launcher says at the end: which rank failed and why, and where the run is kept."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

from distui.core.paths import RunFolder, list_own, open_own, read_own
from distui.core.telemetry.harmless import harmless
from distui.launcher.job.outcome import END_SIGNALS, Outcome, RankOutcome, last_step, read_rank_error, signal_name
from distui.tui.format import cut, duration, scalar
from distui.tui.format import ranks as rank_list

if TYPE_CHECKING:
    from distui.proto.telemetry_pb2 import Snapshot

TRACEBACK_LINES = 14
LOG_LINES = 8

_SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: "probably the kernel's out-of-memory killer: compare the job's memory with the machine's "
    "(dmesg names the process), or somebody sent kill -9",
    signal.SIGSEGV: "a crash in compiled code: a bug in an extension, or memory that it must not touch",
    signal.SIGABRT: "compiled code gave up: an assertion or a C++ exception; its message is in the log",
    signal.SIGBUS: "shared memory or a memory-mapped file ran out: look at the size of /dev/shm",
    signal.SIGILL: "compiled for another processor than this one",
    signal.SIGXCPU: "its limit of processor time is used up: ulimit -t, or the scheduler's",
    signal.SIGXFSZ: "a file grew beyond its limit: ulimit -f",
    signal.SIGTERM: "somebody, or the scheduler, asked this process to end",
}


_CAUSES = frozenset({"left_early", "mismatch", "hang"})
"""Verdicts on what another rank did; who failed only lost its peers by it."""


def failure_report(run: RunFolder, outcome: Outcome) -> str:
    """Return the report of the first failure: rank, host, last step, its own traceback or last words, and the log.

    Where telemetry knows that it failed of what another rank did, that comes first.
    """
    if outcome.report:
        return harmless(outcome.report, lines=True)
    if outcome.failed_rank is None:
        return f"error: {harmless(outcome.message)}"
    return f"{_cause_elsewhere(run)}{_of_rank(run, outcome)}"


def _cause_elsewhere(run: RunFolder) -> str:
    found = _snapshot(run)
    verdicts = found.diagnosis[:1] if found is not None else ()
    return "".join(f"error: {harmless(one.message)}\n" for one in verdicts if one.kind in _CAUSES)


def _of_rank(run: RunFolder, outcome: Outcome) -> str:
    rank = next(found for found in outcome.ranks if found.rank == outcome.failed_rank)
    report = read_rank_error(run, rank.rank)
    host = report["host"] if report else rank.host or socket.gethostname()
    step = report["step"] if report else rank.step if rank.step is not None else last_step(run, rank.rank)
    log = run.rank_log(rank.rank)
    when = "last step n/a" if step is None else f"after step {step}" if step else "before its first step"
    lines = [f"error: rank {rank.rank} failed on {host}, {when}"]
    if report:
        lines += [f"  {line}" for line in _shortened(report["traceback"].rstrip().splitlines())]
        if report.get("fix"):
            lines.append(f"  fix: {report['fix']}")
    else:
        lines.append(f"  {_cause(rank)}")
        if tail := _tail(run, rank.rank):
            lines += ["  its last lines:", *(f"    {line}" for line in tail)]
    lines.append(f"  log: {log}")
    if others := [found for found in outcome.ranks if found.rank != rank.rank]:
        lines.append(f"  other ranks: {_others(others)}")
    return harmless("\n".join(lines), lines=True)


def _cause(rank: RankOutcome) -> str:
    if rank.signal is not None:
        hint = _SIGNAL_HINTS.get(rank.signal)
        return f"it was killed by {signal_name(rank.signal)}" + (f": {hint}" if hint else "")
    return f"it ended with exit status {rank.exit_status}, without an exception"


def _shortened(lines: list[str]) -> list[str]:
    """Return the beginning and, above all, the end of a traceback."""
    if len(lines) <= TRACEBACK_LINES:
        return lines
    left_out = len(lines) - TRACEBACK_LINES
    return [*lines[:3], f"  ... {left_out} lines left out; the log has them all ...", *lines[3 + left_out :]]


def _tail(run: RunFolder, rank: int) -> list[str]:
    try:
        with open(open_own(run.rank_log(rank)), "rb") as log:
            log.seek(max(0, log.seek(0, 2) - 4096))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-LOG_LINES:]


def _others(ranks: list[RankOutcome]) -> str:
    """Return how the other ranks ended, the same endings together."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        if rank.signal in (*END_SIGNALS, signal.SIGKILL) and not rank.error.partition(":")[2]:
            words = "ended by distui"
        elif rank.error:
            words = rank.error
        else:
            words = "finished" if rank.exit_status == 0 else "ended"
        groups.setdefault(words, []).append(rank.rank)
    return "; ".join(f"{rank_list(numbers)} {words}" for words, numbers in groups.items())


def _snapshot(run: RunFolder) -> Snapshot | None:
    """Return what telemetry knows; None where the run sent none."""
    if not list_own(run.telemetry):
        return None
    from distui.launcher.job.daemon_client import snapshot_of

    return snapshot_of(run)


def end_line(run: RunFolder, outcome: Outcome, elapsed_s: float) -> str:
    """Return the last line: the state, steps, time, last loss, where the run is kept, how to look again."""
    found = _snapshot(run)
    states = found.ranks if found is not None else ()
    steps = max((state.step for state in states if state.HasField("step")), default=0)
    losses = [state.loss for state in states if state.HasField("loss")]
    words = [f"distui: {outcome.state} after {duration(elapsed_s)}"]
    if steps:
        words.append(f"{steps} steps")
    if losses:
        words.append(f"last loss {scalar(sum(losses) / len(losses))}")
    if not os.path.lexists(run.path):
        return f"{', '.join(words)}; nothing is kept: {run.path} is gone"
    return f"{', '.join(words)}; kept in {run.path}\ndistui: to look at it again: distui monitor {run.run_id}"


def left_behind(run: RunFolder) -> str:
    """Return the line that names what the script has left running; empty where it has left nothing.

    What is ending with its parent just now gets half a second for it.
    """
    from distui.launcher.job.processes import job_processes, wait_handle

    found = []
    for process in job_processes(run):
        try:
            with open(f"/proc/{process.pid}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            handle = os.pidfd_open(process.pid)
        except OSError:
            continue
        if not wait_handle(handle, 0.5):
            found.append(f"pid {process.pid} ({cut(words, 60)})")
        os.close(handle)
    if not found:
        return ""
    what = "a process" if len(found) == 1 else f"{len(found)} processes"
    return harmless(f"distui: the script has left {what} running, which the job does not end: {', '.join(found)}")


def flops_report(run: RunFolder) -> str:
    """Return the table that `--profile-flops` asked for and where it is kept, or why there is none."""
    try:
        table = harmless(read_own(run.flops).decode(), lines=True)
    except FileNotFoundError:
        return "distui: no FLOPs profile: a script that uses the Engine writes it after its second optimizer step"
    return f"{table}distui: this table is kept in {run.flops}"
