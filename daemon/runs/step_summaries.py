"""All ranks' view of each step, put together from what every rank sends of it."""

from __future__ import annotations

import math
from collections import deque

from distui.daemon.runs.history import History
from distui.proto import telemetry_pb2 as pb

MAX_OPEN = 64
"""Steps that wait for ranks that have not sent theirs."""
NUM_RECENT = 4096
NUM_OLDER = 4096
PERCENTILE_STEPS = 500
FEW_STEPS = 20
_PARTS = ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s")


def _without_ranks(summary: pb.StepSummary) -> pb.StepSummary:
    thinned = pb.StepSummary()
    thinned.CopyFrom(summary)
    thinned.ClearField("rank_step_s")
    return thinned


class StepSummaries:
    """The steps of a run as they are completed by all of its ranks."""

    def __init__(self) -> None:
        self.history: History[pb.StepSummary] = History(NUM_RECENT, NUM_OLDER, _without_ranks)
        self._open: dict[int, dict[int, tuple[float, pb.Step]]] = {}
        self._newest: dict[int, int] = {}
        self._closed_step = 0
        self._times_s: deque[float] = deque(maxlen=PERCENTILE_STEPS)

    def restarted(self, rank: int) -> None:
        """Take steps of `rank` from wherever its new incarnation begins."""
        self._newest.pop(rank, None)
        self._closed_step = 0
        for ranks in self._open.values():
            ranks.pop(rank, None)

    def add(self, rank: int, time_s: float, step: pb.Step, world_size: int, peak_flops: dict[int, float]) -> None:
        """Take in one step of one rank; steps that all ranks have passed are summed up."""
        self._newest[rank] = step.step
        if step.step <= self._closed_step:
            return
        self._open.setdefault(step.step, {})[rank] = (time_s, step)
        passed = min(self._newest.values()) if len(self._newest) >= world_size else 0
        while self._open:
            first = min(self._open)
            if first > passed and len(self._open) <= MAX_OPEN:
                return
            self._close(first, world_size, peak_flops)

    def summed(self, summary: pb.StepSummary) -> None:
        """Take in a step that was summed up elsewhere, of ranks that are not seen here."""
        kept = pb.StepSummary()
        kept.CopyFrom(summary)
        self.history.drop_last_while(lambda known: known.step >= kept.step)
        self._times_s.append(kept.step_s)
        self.history.append(kept)

    def close_all(self, world_size: int, peak_flops: dict[int, float]) -> None:
        """Sum up what there is: the run has ended, no rank sends any more."""
        while self._open:
            self._close(min(self._open), world_size, peak_flops)

    def p99_s(self) -> float:
        """Return the step time that 99 of 100 of the last steps kept below; 0 before the first.

        Of 20 to 100 steps the longest does not count: mostly the first, which compiles.
        """
        ordered = sorted(self._times_s)
        longer = max(len(ordered) // 100, int(len(ordered) >= FEW_STEPS))
        return ordered[len(ordered) - 1 - longer] if ordered else 0.0

    def _close(self, number: int, world_size: int, peak_flops: dict[int, float]) -> None:
        ranks = self._open.pop(number)
        if not ranks:
            return
        self._closed_step = number
        self.history.drop_last_while(lambda kept: kept.step >= number)  # a run that went back to a checkpoint
        summary = summarize(number, ranks, world_size, peak_flops)
        self._times_s.append(summary.step_s)
        self.history.append(summary)


def summarize(
    number: int, ranks: dict[int, tuple[float, pb.Step]], world_size: int, peak_flops: dict[int, float]
) -> pb.StepSummary:
    """Return one step: means over ranks, tokens and samples over the slowest rank's time, and who that was."""
    steps = {rank: step for rank, (_, step) in ranks.items()}
    slowest = max(steps, key=lambda rank: steps[rank].step_s)
    slowest_s = steps[slowest].step_s
    summary = pb.StepSummary(
        step=number,
        time_s=max(time_s for time_s, _ in ranks.values()),
        step_s=_mean([step.step_s for step in steps.values()]),
        slowest_rank=slowest,
        skipped=any(step.skipped for step in steps.values()),
        tokens_per_s=sum(step.tokens for step in steps.values()) / slowest_s if slowest_s > 0 else 0.0,
        samples_per_s=sum(step.samples for step in steps.values()) / slowest_s if slowest_s > 0 else 0.0,
        rank_step_s=[
            steps[rank].step_s if rank in steps else math.nan for rank in range(max(world_size, max(steps) + 1))
        ],
    )
    for name in _PARTS:
        setattr(summary, name, _mean([getattr(step, name) for step in steps.values()]))
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [getattr(step, name) for step in steps.values() if step.HasField(name)]
        if values:
            setattr(summary, name, _mean(values))
    peaks = [peak_flops.get(rank, 0.0) for rank in steps]
    if slowest_s > 0 and all(peaks) and all(step.HasField("flops") for step in steps.values()):
        summary.mfu = sum(step.flops for step in steps.values()) / (slowest_s * sum(peaks))
    return summary


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
