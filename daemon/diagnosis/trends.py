"""What shows over many steps only: a loss against its own past, memory against time, a share that comes and goes."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

CALM_STEPS = 100
"""What a loss usually is, is told from so many steps."""
MIN_CALM_STEPS = 20
JUMP_STEPS = 4
"""A loss that is up for fewer steps met a hard batch."""
BACK_STEPS = 5
NEW_LEVEL_STEPS = 200
NEW_LEVEL_S = 60.0
"""A loss that stays up for so many steps, and for so long that somebody could see it, is the usual one from then on."""
DEVIATIONS = 8.0
"""Of the median absolute deviation, as that of a normal distribution."""
RISE = 0.5
LEAST_RISE = 0.01
KNOWN_HIGHS = 3
"""A height that so many of the last `CALM_STEPS` reached, and came back from, is no news: unequal batches, short ones
before long ones."""
RAISED = 2.0
"""A learning rate that has grown so many times within the last `CALM_STEPS` lifts the loss: a warm restart does."""
_MAD = 1.4826
_REFRESH_STEPS = 10

MIN_POINTS = 16
MAX_POINTS = 64
MIN_SPAN_S = 30.0
MIN_GROWTH_BYTES = 64 << 20
MIN_GROWTH_SHARE = 0.02
STEADY_SHARE = 0.1
"""Of the whole rise, what each quarter of the time must bring: what jumps once, or comes to rest, does not grow."""


class Jump(NamedTuple):
    """A loss that went up and stayed there."""

    step: int
    since_s: float
    seen_s: float
    """When it had stayed there for long enough to be told."""
    usual: float
    now: float
    rates: tuple[float, float] | None = None
    """From what and to what the learning rate was raised before, where that may be why."""


class LossTrend:
    """One rank's losses, and whether they have jumped."""

    __slots__ = (
        "_calm",
        "_first",
        "_high",
        "_last",
        "_limit",
        "_low",
        "_next_look",
        "_num_first",
        "_num_high",
        "_raised",
        "_rates",
        "_seen_s",
        "_start",
        "_usual",
    )

    def __init__(self) -> None:
        self._last = 0
        self._begin()

    def _begin(self) -> None:
        self._calm: deque[float] = deque(maxlen=CALM_STEPS)
        self._high: deque[float] = deque(maxlen=CALM_STEPS)
        self._num_high = self._low = self._next_look = 0
        self._first = (0, 0.0)
        self._limit = self._usual = self._seen_s = 0.0
        self._rates: deque[float] = deque(maxlen=CALM_STEPS)
        self._raised: tuple[float, float] | None = None
        self._start, self._num_first = -math.inf, 0

    def add(self, step: int, loss: float, time_s: float, rate: float | None = None) -> None:
        """Take in a finite loss, and the learning rate that its step was made with. Units: Unix seconds."""
        if step <= self._last:
            self._begin()  # another training in the same script, or one that went back
        self._last = step
        if rate is not None:
            self._rates.append(rate)
        if self._num_first < MIN_CALM_STEPS:
            self._num_first, self._start = self._num_first + 1, max(self._start, loss)
        if len(self._calm) >= MIN_CALM_STEPS and loss > self._highest(step):
            if not self._high:
                self._first, self._raised = (step, time_s), self._rise()
            self._high.append(loss)
            self._num_high += 1
            self._low = 0
            if self._num_high == JUMP_STEPS:
                self._seen_s = time_s
            if self._num_high > NEW_LEVEL_STEPS and time_s - self._first[1] > NEW_LEVEL_S:
                self._calm = self._high.copy()
                self._come_back()
            return
        self._calm.append(loss)
        self._low += 1
        if self._num_high < JUMP_STEPS or self._low >= BACK_STEPS:
            self._come_back()

    def _come_back(self) -> None:
        if self._high:
            self._calm.extend(heapq.nlargest(KNOWN_HIGHS, self._high))
            self._next_look = 0
        self._high.clear()
        self._num_high = 0

    def _rise(self) -> tuple[float, float] | None:
        """Return from what and to what the learning rate has grown of late; None where it has not by much."""
        if not self._rates:
            return None
        lowest, now = min(self._rates), self._rates[-1]
        return (lowest, now) if now > 0 and now >= RAISED * lowest else None

    def _highest(self, step: int) -> float:
        if self._high:  # what it is compared with does not move while it is up
            return self._limit
        if step >= self._next_look:
            self._usual = statistics.median(self._calm)
            deviation = _MAD * statistics.median(abs(loss - self._usual) for loss in self._calm)
            known = heapq.nlargest(KNOWN_HIGHS, self._calm)[-1]
            self._limit = max(known, self._usual + max(DEVIATIONS * deviation, RISE * abs(self._usual), LEAST_RISE))
            if not self._usual and not deviation:
                self._limit = math.inf  # nothing is trained yet (a replay buffer that fills), or all is masked
            self._next_look = step + _REFRESH_STEPS
        return self._limit

    @property
    def jump(self) -> Jump | None:
        """The jump that it has not come back from, if any."""
        if self._num_high < JUMP_STEPS:
            return None
        step, since_s = self._first
        # A loss above all that the training began with is no restart's: it has diverged.
        rates = self._raised if self._high[-1] <= self._start else None
        return Jump(step, since_s, self._seen_s, self._usual, self._high[-1], rates)


class MemoryTrend:
    """What a rank holds over time, thinned so that the whole run counts."""

    __slots__ = ("_gap_s", "_points")

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._gap_s = 1.0

    def add(self, time_s: float, num_bytes: int) -> None:
        """Take in what it holds now. Units: seconds of any clock that does not go back."""
        if self._points and time_s - self._points[-1][0] < self._gap_s:
            return
        self._points.append((time_s, num_bytes))
        if len(self._points) >= MAX_POINTS:
            del self._points[::2]
            self._gap_s *= 2

    @property
    def bytes_per_s(self) -> float:
        """How fast it grows; 0 where it does not grow all the time."""
        if len(self._points) < MIN_POINTS:
            return 0.0
        first_s, last_s = self._points[0][0], self._points[-1][0]
        first_s = min(max(first_s, (first_s + last_s) / 2), last_s - MIN_SPAN_S)
        recent = [(time_s, held) for time_s, held in self._points if time_s >= first_s]
        span_s = recent[-1][0] - recent[0][0]
        if span_s < MIN_SPAN_S * 0.9:
            return 0.0
        quarters: list[list[int]] = [[], [], [], []]
        for time_s, held in recent:
            quarters[min(3, int(4 * (time_s - recent[0][0]) / span_s))].append(held)
        if not all(quarters):
            return 0.0
        means = [sum(quarter) / len(quarter) for quarter in quarters]
        rise = means[-1] - means[0]
        if rise < max(MIN_GROWTH_BYTES, MIN_GROWTH_SHARE * means[-1]):
            return 0.0
        if any(later - earlier < STEADY_SHARE * rise for earlier, later in itertools.pairwise(means)):
            return 0.0
        return rise / (0.75 * span_s)


@dataclass(slots=True)
class Lasting:
    """Since when a share has been high: from above `begin`, until it is below `end`."""

    begin: float
    end: float
    since_s: float = 0.0

    def look(self, share: float, now_s: float) -> float:
        """Take in the share now; return for how long it has been high. Units: seconds."""
        if share < self.end or (not self.since_s and share < self.begin):
            self.since_s = 0.0
            return 0.0
        self.since_s = self.since_s or now_s
        return now_s - self.since_s
