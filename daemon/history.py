"""The steps of a run as all ranks saw them: recent ones whole, older ones thinned, so that memory is bounded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from distui.proto import telemetry_pb2 as pb

RAW_STEPS = 4096
OLD_STEPS = 4096
_MAX_PENDING = 64
_PATIENCE_S = 5.0
"""So long a step waits for ranks that have not told it, in the time of the records."""

_TIMES = ("step_s", "data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s")
_MEANS = ("loss", "grad_norm", "learning_rate")


class StepHistory:
    """Joins the ranks' steps into summaries. Serial numbers count summaries, so that a watcher can ask for what is new."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[float, dict[int, pb.Step]]] = {}
        self._raw: deque[pb.StepSummary] = deque()
        self._old: list[pb.StepSummary] = []
        self._old_stride = 1
        self._aged = 0
        self.serial = 0
        """Number of summaries made so far."""

    def add(self, rank: int, step: pb.Step, time_s: float, num_ranks: int, peak_flops: Mapping[int, float]) -> None:
        """Take one rank's step; `num_ranks` is how many are expected to tell it."""
        if step.step <= self.last_step():
            return  # told after its summary was closed
        ranks = self._pending.setdefault(step.step, (time_s, {}))[1]
        ranks[rank] = step
        if len(ranks) >= num_ranks:
            self._close_through(step.step, num_ranks, peak_flops)
        self.expire(time_s, num_ranks, peak_flops)

    def last_step(self) -> int:
        """Return the newest step that has its summary; 0 before any."""
        return self._raw[-1].step if self._raw else 0

    def rewind(self, step: int) -> None:
        """Forget `step` and what came after it: the job began again from an earlier one."""
        while self._raw and self._raw[-1].step >= step:
            self._raw.pop()
        self._old = [summary for summary in self._old if summary.step < step]
        self._pending = {number: found for number, found in self._pending.items() if number < step}

    def expire(self, now_s: float, num_ranks: int, peak_flops: Mapping[int, float]) -> None:
        """Close the steps that have waited long enough for missing ranks."""
        late = [
            number
            for number, (since_s, _) in self._pending.items()
            if now_s - since_s > _PATIENCE_S or number <= max(self._pending) - _MAX_PENDING
        ]
        if late:
            self._close_through(max(late), num_ranks, peak_flops)

    def flush(self, num_ranks: int, peak_flops: Mapping[int, float]) -> None:
        """Close all steps: no more comes."""
        if self._pending:
            self._close_through(max(self._pending), num_ranks, peak_flops)

    def after(self, serial: int) -> list[pb.StepSummary]:
        """Return the summaries made after the first `serial` ones, as far as they are kept whole."""
        fresh = min(self.serial - serial, len(self._raw))
        return [self._raw[index] for index in range(len(self._raw) - fresh, len(self._raw))] if fresh > 0 else []

    def thinned(self, max_points: int) -> list[pb.StepSummary]:
        """Return the whole history in at most `max_points` summaries (0: all that is kept), the newest among them."""
        found = [*self._old, *self._raw]
        if max_points and len(found) > max_points:
            stride = math.ceil(len(found) / max_points)
            found = found[(len(found) - 1) % stride :: stride]
        return found

    def _close_through(self, step: int, num_ranks: int, peak_flops: Mapping[int, float]) -> None:
        for number in sorted(number for number in self._pending if number <= step):
            time_s, ranks = self._pending.pop(number)
            self._raw.append(_summary(number, time_s, ranks, num_ranks, peak_flops))
            self.serial += 1
        while len(self._raw) > RAW_STEPS:
            self._age(self._raw.popleft())

    def _age(self, summary: pb.StepSummary) -> None:
        self._aged += 1
        if self._aged % self._old_stride:
            return
        summary.ClearField("rank_step_s")
        self._old.append(summary)
        if len(self._old) > OLD_STEPS:
            self._old = self._old[::2]
            self._old_stride *= 2


def _summary(
    number: int, time_s: float, ranks: Mapping[int, pb.Step], num_ranks: int, peak_flops: Mapping[int, float]
) -> pb.StepSummary:
    steps = ranks.values()
    found = pb.StepSummary(step=number, time_s=time_s, skipped=any(step.skipped for step in steps))
    for name in _TIMES:
        setattr(found, name, sum(getattr(step, name) for step in steps) / len(ranks))
    for name in _MEANS:
        if values := [getattr(step, name) for step in steps if step.HasField(name)]:
            setattr(found, name, sum(values) / len(values))
    if found.step_s > 0:
        found.tokens_per_s = sum(step.tokens for step in steps) / found.step_s
        if all(step.HasField("flops") and rank in peak_flops for rank, step in ranks.items()):
            peak = sum(peak_flops[rank] for rank in ranks)
            if peak > 0:
                found.mfu = sum(step.flops for step in steps) / (found.step_s * peak)
    # Ranks wait for each other inside a step, so the slowest is the one with the most time of its own.
    found.slowest_rank = max(ranks, key=lambda rank: ranks[rank].step_s - ranks[rank].exposed_comm_s)
    width = max(num_ranks, max(ranks) + 1)
    found.rank_step_s.extend(ranks[rank].step_s if rank in ranks else math.nan for rank in range(width))
    return found
