"""How much of a run's time it trained: what failures cost, from the last step before one to the first that is new."""

from __future__ import annotations

from distui.proto import telemetry_pb2 as pb

LOST = ("start", "notice", "waiting", "restart", "replay")
"""What is no training, in the order in which it comes. Fields of `pb.Effort`, with `_s`."""


class Effort:
    """Reduces the steps and restarts of a run. Units: all times are Unix seconds, of whoever told them."""

    def __init__(self) -> None:
        self._lost = dict.fromkeys(LOST, 0.0)
        self._phase, self._since_s = "start", 0.0
        self._step = self._reached = 0
        self._last_s = 0.0
        """When the last step ended."""

    def begin(self, started_s: float) -> None:
        """Note when the run began."""
        self._since_s = self._since_s or started_s

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

    def told(self, started_s: float, now_s: float) -> pb.Effort | None:
        """Return what it comes to at `now_s`, or at the run's end; None before its first step."""
        wall_s = now_s - started_s
        if not self._last_s or wall_s <= 0.0:
            return None
        lost = dict(self._lost)
        if self._phase:
            lost[self._phase] += max(0.0, now_s - self._since_s)
        effective_s = max(0.0, wall_s - sum(lost.values()))
        return pb.Effort(wall_s=wall_s, effective=effective_s / wall_s, **{f"{name}_s": lost[name] for name in LOST})
