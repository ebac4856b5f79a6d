"""How much of a run's time it trained: what failures cost, from the last step before one to the first that is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distui.proto import telemetry_pb2 as pb

LOST = ("start", "notice", "waiting", "restart", "replay")
"""What is no training, in the order in which it comes. Fields of `pb.Effort`, with `_s`."""


class Effort:
    """Reduces the steps and restarts of a run. Units: all times are Unix seconds, of whoever told them.

    A run that goes on from another's checkpoints, as a job that was queued again does, goes on with its account too.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        """`earlier` is what run.json has of the run before: its effort, `ended_s`, and the `step` that it came to."""
        self._lost = dict.fromkeys(LOST, 0.0)
        self._phase, self._since_s = "start", 0.0
        self._step = self._reached = 0
        self._earlier_s = 0.0
        """Wall time of the runs before."""
        self._ended_s = 0.0
        """When the run before this one ended."""
        if earlier is not None:
            self._lost |= {name: float(earlier["effort"][f"{name}_s"]) for name in LOST}
            self._earlier_s = float(earlier["effort"]["wall_s"])
            self._reached, self._ended_s = int(earlier["step"]), float(earlier["ended_s"])
            self._phase = "restart"
        self._last_s = 0.0
        """When the last step ended."""

    def begin(self, started_s: float) -> None:
        """Note when the run began."""
        self._since_s = self._since_s or started_s
        if self._ended_s:
            waited_s = max(0.0, started_s - self._ended_s)
            self._lost["waiting"] += waited_s
            self._earlier_s += waited_s

    def step(self, number: int, time_s: float, step_s: float) -> None:
        """Take in that a rank has ended a step; who is the first to tell of a step counts."""
        if number <= self._step:
            return
        self._step = number
        if self._phase in ("start", "notice", "waiting", "restart"):
            self._close(time_s - step_s)
            self._phase = "replay" if number <= self._reached else ""
            self._since_s = time_s - step_s
        if self._phase == "replay" and number > self._reached:
            self._close(time_s - step_s)
            self._phase = ""
        self._last_s = max(self._last_s, time_s)

    def failed(self, time_s: float) -> None:
        """Take in that the ranks have been ended, to be started again."""
        if not self._phase:
            self._phase, self._since_s = "notice", self._last_s
        elif self._phase == "replay":
            self._close(self._last_s)
            self._phase, self._since_s = "notice", self._last_s
        self._close(time_s)
        self._reached, self._step = max(self._reached, self._step), 0
        self._phase, self._since_s = "waiting", time_s

    def ready(self, time_s: float) -> None:
        """Take in that all hosts are there, and ranks are started."""
        if self._phase == "waiting":
            self._close(time_s)
            self._phase, self._since_s = "restart", time_s

    def _close(self, time_s: float) -> None:
        self._lost[self._phase] += max(0.0, time_s - self._since_s)

    def told(self, started_s: float, now_s: float, *, was_cut: bool = False) -> pb.Effort | None:
        """Return what it comes to at `now_s`, or at the run's end; None before its first step.

        `was_cut`: it has ended before it was done, so that what came after its last step was no training.
        """
        wall_s = now_s - started_s
        if not self._last_s or wall_s <= 0.0:
            return None
        wall_s += self._earlier_s
        lost = dict(self._lost)
        if was_cut and self._phase in ("", "replay"):
            if self._phase:
                lost["replay"] += max(0.0, self._last_s - self._since_s)
            lost["notice"] += max(0.0, now_s - self._last_s)
        elif self._phase:
            lost[self._phase] += max(0.0, now_s - self._since_s)
        effective_s = max(0.0, wall_s - sum(lost.values()))
        return pb.Effort(wall_s=wall_s, effective=effective_s / wall_s, **{f"{name}_s": lost[name] for name in LOST})
