"""A job whose launcher is a process of its own, so that its terminal can be left: `--detach`, q on the dashboard."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType

from distui.core.errors import EXIT_BUG
from distui.core.paths import RunFolder, open_own
from distui.launcher.job.job import HANGUP_S, Job
from distui.launcher.job.outcome import Outcome, read_outcome
from distui.launcher.job.processes import wait_handle


class Background:
    """Holds the job through its launcher, the child, as `Job` holds it through its agent.

    The child ends the job when this process ends, unless it was let go.
    """

    console = None

    def __init__(self, run: RunFolder, start: Callable[[], Job], follow: Callable[[Job], Outcome]) -> None:
        """Fork the launcher: it calls `start`, then `follow` until the job has ended. No thread may run yet."""
        self.run = run
        self.stopped_by: signal.Signals | None = None
        self._status: int | None = None
        leash, self._leash = os.pipe()
        ready, started = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._leash)
            _be_launcher(run, start, follow, leash, started)
        os.close(leash)
        os.close(started)
        os.read(ready, 1)  # from here on the job can be found, or its launcher has failed
        os.close(ready)
        self._handle = os.pidfd_open(self._pid)

    def ended(self) -> int | None:
        """Return the launcher's exit status; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the job; False after `timeout_s`."""
        return wait_handle(self._handle, timeout_s)

    def stop(self, signum: signal.Signals = signal.SIGINT) -> None:
        """Have the launcher stop the job; a second call kills at once."""
        if self.ended() is None:
            self.stopped_by = self.stopped_by or signum
            os.kill(self._pid, signum)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Be the handler of SIGINT, SIGTERM, SIGHUP and SIGUSR1."""
        if signum == signal.SIGUSR1:
            os.kill(self._pid, signum)
            return
        self.stop(signal.Signals(signum))
        if signum == signal.SIGHUP:
            # A dashboard may wait for ever for its terminal.
            timer = threading.Timer(HANGUP_S, lambda: os._exit(128 + signal.SIGHUP))
            timer.daemon = True
            timer.start()

    def let_go(self) -> None:
        """Let the job go on when this process ends, and its terminal with it."""
        os.write(self._leash, b"q")

    def finish(self) -> Outcome:
        """Wait for the end and return the outcome."""
        while not self.wait(3600.0):
            pass
        status = self.ended()
        os.close(self._handle)
        found = read_outcome(self.run)
        return found or Outcome("failed", EXIT_BUG, f"the launcher ended with status {status}, without an outcome")


def _be_launcher(
    run: RunFolder, start: Callable[[], Job], follow: Callable[[Job], Outcome], leash: int, started: int
) -> None:
    """Be the child: in a session of its own, with its words in the launcher's log. Does not return."""
    status = EXIT_BUG
    try:
        os.setsid()
        log = open_own(run.logs / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for stream, target in ((0, nothing), (1, log), (2, log)):
            os.dup2(target, stream)
        job = start()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, job.on_signal)

        os.close(started)

        def hold() -> None:
            if not os.read(leash, 1):
                job.stop(signal.SIGHUP)  # whoever held the job is gone, and has not let go

        threading.Thread(target=hold, name="leash", daemon=True).start()
        status = follow(job).exit_status
    except BaseException:  # noqa: BLE001  the last frame of this process: told in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
