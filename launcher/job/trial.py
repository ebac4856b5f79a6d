"""A short real launch of a script, stopped once enough of its steps were measured."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from distui.core.errors import DaemonUnavailable, UserError
from distui.core.paths import RunFolder
from distui.launcher.job.job import Job
from distui.launcher.job.launch import agent_for, create_run, hold, resolve
from distui.launcher.job.outcome import Outcome
from distui.launcher.job.request import LaunchRequest

LOOK_S = 0.25
"""Between two looks at how far a trial is."""


@dataclass(slots=True)
class Trial:
    """What was measured of one launch; `reason` says why it was not, or not in full."""

    num_steps: int = 0
    step_s: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    peak_memory_bytes: int | None = None
    micro_size: int | None = None
    accumulation: int = 1
    reason: str = ""

    @property
    def speed(self) -> float:
        """What trials are ranked by; 0 where nothing was measured."""
        return self.tokens_per_s or self.samples_per_s or (1 / self.step_s if self.step_s else 0.0)


class Trials:
    """Runs one trial after the other. A signal ends the one that runs, and asks for no more."""

    def __init__(self, warmup_steps: int, num_steps: int, limit_s: float) -> None:
        self._warmup, self._last, self._limit_s = warmup_steps, warmup_steps + num_steps, limit_s
        self._job: Job | None = None
        self.stopped_by: signal.Signals | None = None

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Be the handler of SIGINT, SIGTERM and SIGHUP; a second one kills the ranks at once."""
        self.stopped_by = signal.Signals(signum)
        if self._job is not None:
            self._job.stop(self.stopped_by)

    def measure(self, request: LaunchRequest) -> Trial:
        """Launch, and stop after the steps that are measured; what goes wrong with the settings is the reason."""
        try:
            config = resolve(request)
        except UserError as error:
            return Trial(reason=f"{error.what}: {error.why}")
        run = create_run(request, config)
        self._job = job = Job(run, request.target, dict(os.environ), agent=agent_for(config))
        if self.stopped_by is not None:
            job.stop(self.stopped_by)  # it came while the job was being started
        outcome = hold(config, job, lambda socket: self._follow(job, socket))
        self._job = None
        return self._measured(run, outcome)

    def _follow(self, job: Job, socket: Path | None) -> None:
        from distui.launcher.job.daemon_client import get_snapshot

        end_s = time.monotonic() + self._limit_s
        while not job.wait(LOOK_S):
            if job.stopped_by is not None:
                continue
            try:
                ranks = get_snapshot(socket, job.run.run_id).ranks if socket is not None else ()
            except (DaemonUnavailable, UserError):
                continue  # it has not heard of the run yet, or is started anew
            # What the daemon has got, not what the ranks have done: only that is kept when they are stopped.
            step = min((rank.last_step.step for rank in ranks), default=0)
            if step >= self._last or time.monotonic() >= end_s:
                job.stop(signal.SIGTERM)

    def _measured(self, run: RunFolder, outcome: Outcome) -> Trial:
        from distui.daemon.runs.snapshot import load_state
        from distui.daemon.runs.state import OWN_STRATEGY

        if outcome.state == "failed":
            return Trial(reason=f"failed: {outcome.message}")
        state = load_state(run)
        if state.info.strategy == OWN_STRATEGY:
            raise UserError(
                "this script cannot be tuned",
                "it trains without distui's engine, so that no setting of a strategy changes what it does",
                "use distui.Engine in it, or launch --as accelerate or --as deepspeed what is written for these",
            )
        state.steps.close_all(state.world_size(), {})
        steps = [step for step in state.steps.history.all() if self._warmup < step.step <= self._last]
        if not steps:
            ended = "the script ended" if outcome.state == "finished" else f"{self._limit_s:.0f} s were over"
            return Trial(reason=f"{ended} before step {self._warmup + 1}; --warmup and --seconds say what is measured")
        times_s = [max(one for one in step.rank_step_s if not math.isnan(one)) for step in steps]
        total_s = math.fsum(times_s)
        tokens, samples = (
            math.fsum(rate * time_s for rate, time_s in zip(rates, times_s, strict=True)) / total_s
            for rates in ([step.tokens_per_s for step in steps], [step.samples_per_s for step in steps])
        )
        lasts = [rank.last_step for rank in state.ranks.values() if rank.last_step is not None]
        times = max(lasts[0].micro_batches, 1) if lasts else 1
        memory = [rank.memory for rank in state.ranks.values() if rank.memory is not None]
        peaks = [one.peak_allocated_bytes or one.peak_rss_bytes for one in memory]
        return Trial(
            len(steps),
            total_s / len(steps),
            tokens or None,
            samples or None,
            max(peaks, default=0) or None,
            (lasts[0].samples // times or None) if lasts else None,
            times,
        )
