"""The launcher's hold on a started job: the agent process, stopping it, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from distui.core.errors import EXIT_BUG, EXIT_OK, EXIT_RANK_FAILED
from distui.core.paths import RunFolder, open_own, write_own
from distui.launcher.job.console import CONSOLE_ENV, Console
from distui.launcher.job.outcome import Outcome, read_outcome, signal_name
from distui.launcher.job.processes import AGENT_PID_ENV, GRACE_S, kill_job, wait_handle

AGENT = "distui.launcher.node.agent"
SUPERVISOR = "distui.launcher.cluster.supervisor"
_AGENT_MARGIN_S = 0.8
"""What the agent has on top of the ranks' grace period to end them."""

_OUTCOME_S = 0.8
"""For so long the agent may take to tell how the ranks ended, once they were killed."""

HANGUP_S = GRACE_S + 2.0
"""After a hangup a dashboard may wait for ever for its terminal; after this time the process leaves it."""


class Job:
    """A running job: one agent process on this node and, under it, the ranks; or the supervisor of agents on hosts.

    `stop` never blocks, so a signal handler may call it. Nothing of the job outlives `finish`, unless it finished well.
    """

    def __init__(
        self,
        run: RunFolder,
        command: Sequence[str],
        environ: dict[str, str],
        console: Console | None = None,
        agent: str = AGENT,
        *,
        saves_on_term: bool = False,
    ) -> None:
        """Start `agent`, a module: that of this node, or the supervisor of a job on many hosts.

        It is told the script's `command` over a pipe: run.json may keep it without its secrets.
        With `console` rank 0 has this process's stdin, else none. With `saves_on_term` SIGTERM comes from a scheduler
        that wants the job to give way: it saves, and ends with 75. Slurm sends several, so that a second is no other.
        """
        self.run, self.console = run, console
        self.stopped_by: signal.Signals | None = None
        self._saves_on_term = saves_on_term
        self._end_signal = signal.SIGINT if saves_on_term else signal.SIGTERM
        self._timers: list[threading.Timer] = []
        inherited = console.inherited() if console is not None else ()
        with open(open_own(run.logs / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", agent, str(run.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environ, AGENT_PID_ENV: str(os.getpid()), CONSOLE_ENV: ",".join(map(str, inherited))},
                pass_fds=inherited,
                start_new_session=True,  # the terminal's Ctrl-C is ours to pass on
            )
        self._handle = os.pidfd_open(self._agent.pid)
        if console is not None:
            console.given()
        assert self._agent.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._agent.stdin as pipe:  # it has ended: `finish` tells how
            pipe.write(json.dumps(list(command)).encode())

    def ended(self) -> int | None:
        """Return the agent's exit status; None while it runs."""
        return self._agent.poll()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the job; False after `timeout_s`. A signal that arrives is handled first."""
        return wait_handle(self._handle, timeout_s)

    def stop(self, signum: signal.Signals = signal.SIGINT) -> None:
        """Have the ranks ended: SIGTERM, then SIGKILL after the grace period. A second call kills at once."""
        if self.ended() is not None:
            return
        if self.stopped_by is None:
            self.stopped_by = signum
            self._agent.send_signal(self._end_signal)
            self._later(GRACE_S + _AGENT_MARGIN_S, self._kill)
        else:
            self._kill()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(delay_s, action)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Be the handler of SIGINT, SIGTERM, SIGHUP and SIGUSR1."""
        if signum == signal.SIGUSR1 or (signum == signal.SIGTERM and self._saves_on_term):
            if self.ended() is None:
                self._agent.send_signal(signal.SIGUSR1)
            return
        self.stop(signal.Signals(signum))
        if signum == signal.SIGHUP:
            self._later(HANGUP_S, lambda: os._exit(128 + signal.SIGHUP))

    def _kill(self) -> None:
        kill_job(self.run)
        self._later(_OUTCOME_S, self._agent.kill)

    def finish(self) -> Outcome:
        """Wait for the end and return the outcome; write it where the agent could not."""
        while not self.wait(3600.0):
            pass
        status = self._agent.wait()
        os.close(self._handle)
        for timer in self._timers:
            timer.cancel()
        outcome = read_outcome(self.run)
        if outcome is None:
            outcome = self._without_agent(status)
            if outcome.state != "finished":
                kill_job(self.run)  # the kernel has killed the ranks with the agent, but not what they had started
            try:
                outcome.write(self.run)
            except OSError as error:
                print(f"distui: how the job ended cannot be kept: {error}", file=sys.stderr)
        elif self.stopped_by is not None and outcome.state == "stopped":
            outcome.exit_status = 128 + self.stopped_by
            outcome.message = f"stopped by {self.stopped_by.name}"
            outcome.write(self.run)
        return outcome

    def _without_agent(self, status: int) -> Outcome:
        if self.stopped_by is not None:
            return Outcome("stopped", 128 + self.stopped_by, f"stopped by {self.stopped_by.name}")
        if status == EXIT_OK:
            return Outcome("finished", EXIT_OK, "")
        if status == EXIT_RANK_FAILED:
            return Outcome("failed", status, f"a rank failed, and {self.run.path} could not keep of what")
        how = f"was killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"
        return Outcome("failed", EXIT_BUG, f"the launcher's agent {how}; see {self.run.logs / 'launcher.log'}")


def write_spec(run: RunFolder, spec: dict[str, object]) -> None:
    """Write run.json with the time of the start."""
    write_own(run.spec, json.dumps({**spec, "started_s": time.time()}, indent=1))
