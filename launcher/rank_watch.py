"""When and how each rank of this node ended, and the end of those that outlive the grace period."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

import psutil

from distui.launcher.outcome import Ending
from distui.launcher.processes import GRACE_S, JOB_POLL_S


class RankWatch(threading.Thread):
    """A thread of the agent that waits on the ranks beside elastic, which polls and keeps no times.

    It looks at an ended rank without reaping it, so elastic still finds its exit status. From the first rank that
    ends badly, or from `stopping`, the others have the grace period; then `kill` is called.
    """

    def __init__(self, num_ranks: int, kill: Callable[[], None]) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.num_ranks, self._kill = num_ranks, kill
        self._endings: dict[int, Ending] = {}
        self._pids: dict[int, int] = {}

    def endings(self) -> dict[int, Ending]:
        """Return rank -> how it ended, for those whose end was seen."""
        return dict(self._endings)

    def run(self) -> None:
        """Wait until every rank has ended."""
        handles: dict[int, int] = {}
        poll = select.poll()
        deadline: float | None = None
        while len(self._endings) < self.num_ranks:
            if len(self._pids) < self.num_ranks:
                for pid in self._new_ranks():
                    try:
                        handle = os.pidfd_open(pid)
                    except ProcessLookupError:
                        continue
                    handles[handle] = pid
                    poll.register(handle, select.POLLIN)
            timeout_s = JOB_POLL_S if len(self._pids) < self.num_ranks else 3600.0
            if deadline is not None:
                timeout_s = min(timeout_s, max(0.0, deadline - time.monotonic()))
            for handle, _ in poll.poll(timeout_s * 1000):
                pid = handles.pop(handle)
                poll.unregister(handle)
                os.close(handle)
                ending = self._look(pid)
                self._endings[ending.rank] = ending
                if (ending.exit_status != 0 or ending.signal) and deadline is None:
                    deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() >= deadline:
                deadline = None
                self._kill()

    def _new_ranks(self) -> list[int]:
        """Return the ranks that were not known: children of this process that have RANK in their environment."""
        found = []
        for child in psutil.Process().children():
            if child.pid in self._pids:
                continue
            try:
                rank = child.environ().get("RANK")
            except (psutil.Error, OSError):
                continue
            if rank is not None:
                self._pids[child.pid] = int(rank)
                found.append(child.pid)
        return found

    def _look(self, pid: int) -> Ending:
        now = time.time()
        try:
            result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            result = None  # elastic was first
        exit_status = signum = None
        if result is not None:
            exited = result.si_code == os.CLD_EXITED
            exit_status, signum = (result.si_status, None) if exited else (None, result.si_status)
        return Ending(self._pids[pid], pid, exit_status, signum, now)
