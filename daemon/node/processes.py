"""What the kernel says of a process of this node, and how many files it may open."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from distui.core.paths import JOB_ENV, RunFolder

RUNNING, STOPPED, DEAD = "running", "stopped", "dead"
MAX_FILES = 1 << 16
_SLACK_S = 2.0
"""Boot time and clock are known to about a second."""


def raise_file_limit() -> None:
    """Allow this process as many open files as the system lets it have, up to `MAX_FILES`: each caller holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def process_state(pid: int, began_s: float) -> str:
    """Return `running`, `stopped` (by a signal or a debugger) or `dead`.

    A process that started after `began_s` (Unix seconds) has taken over the pid of the one that is meant: `dead`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return DEAD
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks
    state, started_ticks = fields[0], int(fields[19])
    if began_s and _boot_s() + started_ticks / os.sysconf("SC_CLK_TCK") > began_s + _SLACK_S:
        return DEAD
    if state in "ZXx":
        return DEAD
    return STOPPED if state in "Tt" else RUNNING


def traced_by(pid: int) -> tuple[int, str]:
    """Return the debugger that holds a process still, and its name; (0, "") where none does."""
    try:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
            if ":\t" in line
        )
        tracer = int(status.get("TracerPid", 0))
        if not tracer or not status.get("State", "").startswith("t"):
            return 0, ""
        return tracer, Path(f"/proc/{tracer}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return 0, ""  # it has ended, or let go


def heirs(run: RunFolder, rank: int, pid: int) -> list[int]:
    """Return the processes of this node that a rank, once of `pid`, has started or forked, and that live."""
    marks = {f"{JOB_ENV}={run.path}".encode(), f"RANK={rank}".encode()}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (pid, os.getpid()):
            continue
        try:
            state, _, _, session = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            if state in "ZX" or (
                int(session) != pid and not marks <= set(Path(f"/proc/{name}/environ").read_bytes().split(b"\0"))
            ):
                continue
        except (OSError, ValueError):
            continue  # it has ended meanwhile, or is another user's
        found.append(int(name))
    return sorted(found)


_boot_times_s: list[float] = []
"""When the system started, as the kernel has told: another time once the clock was set."""


def clock_was_set() -> None:
    """Take in that the clock has jumped, and with it the time of the system's start.

    Processes are compared with the earliest, so that none is taken for another that has its pid.
    """
    _boot_times_s.append(_read_boot_s())


def _boot_s() -> float:
    if not _boot_times_s:
        _boot_times_s.append(_read_boot_s())
    return min(_boot_times_s)


def _read_boot_s() -> float:
    for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
