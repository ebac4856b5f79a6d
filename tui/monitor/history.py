"""The steps of a run as bounded columns, for charts that never grow with the run."""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distui.proto import telemetry_pb2 as pb

NAN = math.nan
PHASES = ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s")
"""The measured parts of a step, in the order in which they happen; what is in none of them is `other`."""
PHASE_NAMES = ("data wait", "forward", "backward", "exposed comm", "optimizer", "other")
_OPTIONAL = ("loss", "grad_norm", "learning_rate", "mfu")
COLUMNS = ("step", "time_s", *_OPTIONAL, "step_s", *PHASES, "tokens_per_s", "samples_per_s")


@dataclass(frozen=True, slots=True)
class RankRow:
    """One step's times by rank, for the heatmap."""

    step: int
    step_s: array[float]


class StepHistory:
    """Columns of step summaries, ascending in step; when full, every second one of the older half is dropped.

    An absent value is NaN. Per-rank times are kept for the newest `rank_rows` steps only.
    """

    def __init__(self, capacity: int = 4096, rank_rows: int = 512) -> None:
        self._capacity, self._rank_rows = capacity, rank_rows
        self._columns: dict[str, array[float]] = {name: array("d") for name in COLUMNS}
        self.rows: list[RankRow] = []
        self.revision = 0
        """Grows with each step taken in, so that a view can tell whether there are new ones."""

    def __len__(self) -> int:
        return len(self._columns["step"])

    def column(self, name: str, window: slice = slice(None)) -> array[float]:
        """Return the values of one column, oldest first; NaN is not available."""
        return self._columns[name][window]

    def last(self, name: str) -> float | None:
        """Return the newest available value of a column; None where there is none."""
        return next((value for value in reversed(self._columns[name]) if not math.isnan(value)), None)

    def append(self, summary: pb.StepSummary) -> bool:
        """Add a step and return whether it was new; what came before (after a reconnect) is left out.

        A step that is later in time but not in number is a job begun again from a checkpoint: the steps from there on
        are replaced.
        """
        if len(self):
            if summary.time_s <= self._columns["time_s"][-1]:
                return False
            if summary.step <= self._columns["step"][-1]:
                self._drop_from(summary.step)
        for name in _OPTIONAL:
            self._columns[name].append(getattr(summary, name) if summary.HasField(name) else NAN)
        self._columns["step"].append(summary.step)
        self._columns["time_s"].append(summary.time_s)
        self._columns["step_s"].append(summary.step_s or NAN)
        measured = any(getattr(summary, name) for name in PHASES)
        for name in PHASES:
            self._columns[name].append(getattr(summary, name) if measured else NAN)
        # A step of a script that does not count tokens has none: that is "not available", not a rate of 0.
        self._columns["tokens_per_s"].append(summary.tokens_per_s or NAN)
        self._columns["samples_per_s"].append(summary.samples_per_s or NAN)
        if summary.rank_step_s:
            self.rows.append(RankRow(summary.step, array("f", summary.rank_step_s)))
            if len(self.rows) > self._rank_rows + 64:
                del self.rows[: len(self.rows) - self._rank_rows]
        if len(self) > self._capacity:
            self._thin()
        self.revision += 1
        return True

    def _drop_from(self, step: int) -> None:
        keep = bisect.bisect_left(self._columns["step"], step)
        for values in self._columns.values():
            del values[keep:]
        self.rows = [row for row in self.rows if row.step < step]

    def _thin(self) -> None:
        half = len(self) // 2
        for values in self._columns.values():
            values[:half] = values[:half:2]

    def window(self, num_steps: int | None, end_step: int | None) -> slice:
        """Return the slice of the last `num_steps` steps up to `end_step`; None is all, and the newest."""
        steps = self._columns["step"]
        stop = len(steps) if end_step is None else bisect.bisect_right(steps, end_step)
        if num_steps is None or stop == 0:
            return slice(0, stop)
        return slice(bisect.bisect_right(steps, steps[stop - 1] - num_steps), stop)

    def window_rows(self, num_steps: int | None, end_step: int | None) -> list[RankRow]:
        """Return the per-rank rows of the same window."""
        end = end_step if end_step is not None else math.inf
        first = -math.inf if num_steps is None else (end if end_step is not None else self._newest()) - num_steps
        return [row for row in self.rows if first < row.step <= end]

    def _newest(self) -> float:
        return self._columns["step"][-1] if len(self) else 0.0

    def rank_times(self, rank: int, num_steps: int = 64) -> list[float]:
        """Return the last step times of one rank, oldest first; NaN where it sent none."""
        return [row.step_s[rank] if rank < len(row.step_s) else NAN for row in self.rows[-num_steps:]]

    def other(self, window: slice = slice(None)) -> array[float]:
        """Return what of each step is in none of the measured parts; NaN where nothing was measured."""
        parts = [self.column(name, window) for name in PHASES]
        rest = np.asarray(self.column("step_s", window)) - np.sum([np.asarray(part) for part in parts], axis=0)
        return array("d", np.maximum(rest, 0.0).tobytes())

    def split(self, window: slice = slice(None)) -> list[float] | None:
        """Return the mean seconds of each phase of PHASE_NAMES over the window; None where nothing was measured."""
        columns = [*(self.column(name, window) for name in PHASES), self.other(window)]
        means = [_mean(values) for values in columns]
        return None if math.isnan(means[0]) else means

    def copy(self) -> StepHistory:
        """Return a copy that later steps do not change."""
        other = StepHistory(self._capacity, self._rank_rows)
        other._columns = {name: values[:] for name, values in self._columns.items()}
        other.rows, other.revision = list(self.rows), self.revision
        return other


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN
