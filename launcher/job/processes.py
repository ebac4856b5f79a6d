"""The processes of a job: bound to their parent's life, found again by their environment, and ended for certain.

A rank carries `DISTUI_JOB` in its environment and so does what it starts; each rank leads a
session. A process is the job's if it has either mark, so neither double forks nor cleaned environments hide it, unless
it has done both.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from distui.core.paths import JOB_ENV, RunFolder, list_own, open_own, read_own

AGENT_PID_ENV = "DISTUI_AGENT_PID"
GRACE_S = 3.0
"""Between SIGTERM and SIGKILL; with the launcher's own second it keeps a stop under 5 s."""

JOB_POLL_S = 0.05
"""Between two looks for ranks that are being started."""

_PR_SET_PDEATHSIG = 1
_SESSIONS = "sessions"
"""With the host's name: the folder may lie on a disk that several hosts of a job share."""
_STOP = "stop"


def die_with_parent(parent_pid: int, signum: signal.Signals) -> None:
    """Have the kernel send this process `signum` when its parent ends, even by SIGKILL.

    The kernel forgets the wish at fork, so each process asks for itself. A parent that has already ended is noticed
    by its id: then the signal is sent at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


@dataclass(frozen=True, slots=True)
class JobProcess:
    """A live process of a job; `rank` is the global one where the process or its ancestor is a rank."""

    pid: int
    session: int
    rank: int | None
    agent: int | None = None
    """The process that started the rank, as far as the environment tells."""


def _read_stat(pid: int) -> tuple[str, int]:
    """Return the state letter and the session of a process."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[3])


def record_session(run: RunFolder) -> None:
    """Note that this process leads a session of the job, so that its children are found when it is no more."""
    descriptor = open_own(_sessions_file(run), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(descriptor, "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


def request_stop(run: RunFolder) -> bool:
    """Note that the job is to be stopped by `distui control`; False where that was noted before."""
    try:
        os.close(open_own(run.path / _STOP, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def request_preemption(run: RunFolder) -> None:
    """Have the ranks save at a step that they agree on, and end with 75."""
    with contextlib.suppress(OSError):  # a full disk: they are ended without it, when their time is over
        os.close(open_own(run.preempt, os.O_WRONLY | os.O_CREAT))


def give_way(run: RunFolder) -> bool:
    """Take SIGTERM for the wish that the job saves and ends; False where the job is being stopped."""
    if stop_requested(run):
        return False
    request_preemption(run)
    return True


def stop_requested(run: RunFolder) -> bool:
    """Return whether `distui control` stopped the job."""
    return _STOP in list_own(run.path)


def _sessions_file(run: RunFolder) -> Path:
    return run.path / f"{_SESSIONS}-{socket.gethostname()}"


def _sessions(run: RunFolder) -> set[int]:
    try:
        return {int(line) for line in read_own(_sessions_file(run)).split()}
    except FileNotFoundError:
        return set()  # no rank has begun


def job_processes(run: RunFolder) -> list[JobProcess]:
    """Return the live processes of `run` on this node, but for this one."""
    mark = f"{JOB_ENV}={run.path}".encode()
    sessions = _sessions(run)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or (pid := int(entry)) == os.getpid():
            continue
        try:
            state, session = _read_stat(pid)
            if state in "ZX":
                continue
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue  # it ended meanwhile, or is another user's
        if mark not in environ and session not in sessions:
            continue
        rank, agent = _number(environ, "RANK"), _number(environ, AGENT_PID_ENV)
        found.append(JobProcess(pid, session, rank, agent))
    return found


def _number(environ: list[bytes], name: str) -> int | None:
    prefix = f"{name}=".encode()
    text = next((item[len(prefix) :] for item in environ if item.startswith(prefix)), b"")
    return int(text) if text.isdigit() else None


def own_processes(run: RunFolder) -> list[JobProcess]:
    """Return the processes of `run` on this node, but for those of other agents: several "hosts" may be one machine."""
    found = job_processes(run)
    agents = {process.pid: process.agent for process in found}
    mine = (None, os.getpid())
    return [one for one in found if (one.agent or agents.get(one.session)) in mine]


def signal_all(pids: Iterable[int], signum: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def kill_job(
    run: RunFolder, within_s: float = 1.0, found: Callable[[RunFolder], list[JobProcess]] = job_processes
) -> None:
    """SIGKILL every process of a job that is `found` until none is, for at most `within_s`.

    What forks while it is being killed is found by the next look. A process in uninterruptible sleep dies when the
    kernel lets go of it; it is not waited for longer.
    """
    deadline = time.monotonic() + within_s
    while pids := [process.pid for process in found(run)]:
        handles = []
        for pid in pids:
            try:
                handles.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue
        signal_all(pids, signal.SIGKILL)
        for handle in handles:
            wait_handle(handle, deadline - time.monotonic())
            os.close(handle)
        if time.monotonic() >= deadline:
            return


def wait_handle(pidfd: int, timeout_s: float) -> bool:
    """Wait until the process of a pidfd has ended; False after `timeout_s`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def own_command(module: str) -> list[str]:
    """Return the command of a module of ours: this side's own Python, by its whole path."""
    command = [sys.executable, "-u", "-m", module]
    package = importlib.util.find_spec("distui")
    assert package is not None and package.origin is not None
    home = str(Path(package.origin).resolve().parents[1])
    return command if home.endswith("-packages") else ["env", f"PYTHONPATH={home}", *command]  # a checkout
