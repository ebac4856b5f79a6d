"""A job that another process has started, found by its agent: to look at it from here, to wait for it, to stop it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from distui.core.config.settings import load
from distui.core.paths import RunFolder
from distui.launcher.job.job import AGENT, SUPERVISOR
from distui.launcher.job.outcome import Outcome, read_outcome
from distui.launcher.job.processes import GRACE_S, kill_job, wait_handle

AGENTS = {AGENT.encode(), SUPERVISOR.encode()}
MARGIN_S = 2.0
"""What an agent has on top of the ranks' grace period."""


def agent_of(run: RunFolder) -> int | None:
    """Return the process that holds the run's ranks on this node; None where there is none any more."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0") if entry.isdigit() else []
            if AGENTS.intersection(words) and os.fsencode(run.path.resolve()) in [
                os.path.realpath(word) for word in words[-2:] if word
            ]:
                found[int(entry)] = psutil.Process(int(entry)).ppid()
        except (OSError, psutil.NoSuchProcess):
            continue  # it ended meanwhile
    # What an agent is just starting has its command line until it has its own, and may have a lower number.
    return next((pid for pid, parent in found.items() if parent not in found), None)


class AttachedJob:
    """The job as `Job` has it, but that leaving it does not end it."""

    console = None

    def __init__(self, run: RunFolder, agent: int) -> None:
        self.run = run
        self.stopped_by: signal.Signals | None = None
        self._agent, self._handle = agent, os.pidfd_open(agent)
        saves_on_term = load(run.config, {}, environ={}).config.cluster.on_preempt == "save"
        self._end_signal = signal.SIGINT if saves_on_term else signal.SIGTERM

    def ended(self) -> int | None:
        """Return the job's exit status; None while it runs."""
        if not self.wait(0.0):
            return None
        outcome = read_outcome(self.run)
        return outcome.exit_status if outcome is not None else 1

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the job; False after `timeout_s`."""
        return wait_handle(self._handle, timeout_s)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Have the ranks ended: SIGTERM, and SIGKILL after the grace period. A second call kills at once."""
        if self.ended() is not None:
            return
        if self.stopped_by is None:
            self.stopped_by = signum
            signal.pidfd_send_signal(self._handle, self._end_signal)
        else:
            kill_job(self.run)

    def stopped(self) -> Outcome | None:
        """Wait for the end after `stop`; kill what outlives the grace period. None where nobody wrote an outcome."""
        if not self.wait(GRACE_S + MARGIN_S):
            kill_job(self.run)
            self.wait(MARGIN_S)
        return read_outcome(self.run)
