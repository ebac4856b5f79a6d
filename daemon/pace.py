"""Who holds up the others all the time, and which group has become slow: from the collectives that all have told of.

Synchronous training makes all ranks' steps equally long, so a straggler shows in who arrives last, and by how much.
A slow link shows in the time from the last arrival to the end, against what the same collective took before, or what
it takes in the groups beside.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from distui.proto import telemetry_pb2 as pb

WINDOW_S = 2.0
NUM_WINDOWS, MIN_WINDOWS = 5, 3
"""A verdict needs this many of the last windows to agree."""
MIN_COLLECTIVES = 8
LOST_SHARE = 0.08
"""A straggler costs the others at least this share of their time."""
BLAME_SHARE = 0.75
"""And at least this share of all time that ranks waited for the last one."""
SLOWER = 4.0
SLOWER_S = 0.005
NUM_BASELINE = 24
MAX_LINKS = 256


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that the others wait for again and again."""

    rank: int
    group: str
    op: str
    seq: int
    lost_share: float
    mean_gap_s: float
    since_s: float


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A group in which the same transfer takes much longer than it did, or than it does elsewhere."""

    group: str
    op: str
    seq: int
    num_bytes: int
    took_s: float
    usual_s: float
    ranks: tuple[int, ...]
    since_s: float


@dataclass(slots=True)
class _Window:
    began_s: float
    newest_s: float = 0.0
    num: int = 0
    lost_s: dict[int, float] = field(default_factory=dict)
    times_last: dict[int, int] = field(default_factory=dict)
    newest: pb.Collective | None = None

    def blamed(self) -> int | None:
        """Return the rank that cost the others most of what they lost."""
        lasted_s = self.newest_s - self.began_s
        total_s = sum(self.lost_s.values())
        if self.num < MIN_COLLECTIVES or lasted_s <= 0 or not total_s:
            return None
        rank = max(self.lost_s, key=lambda one: self.lost_s[one])
        lost_s = self.lost_s[rank]
        return rank if lost_s / lasted_s > LOST_SHARE and lost_s / total_s > BLAME_SHARE else None


@dataclass(slots=True)
class _Link:
    ranks: tuple[int, ...]
    usual_s: float = math.inf
    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=MIN_COLLECTIVES))
    slow_since_s: float = 0.0
    newest: pb.Collective | None = None


class Pace:
    """Takes in each collective once all ranks of its group have told of it."""

    def __init__(self) -> None:
        self._windows: dict[str, deque[_Window]] = {}
        self._links: dict[tuple[str, str, int], _Link] = {}

    def add(self, ranks: dict[int, pb.Collective]) -> None:
        """Take in what every member told of one collective."""
        arrivals = sorted((one.enqueued_s, rank) for rank, one in ranks.items())
        last_s, last = arrivals[-1]
        newest = ranks[last]
        windows = self._windows.setdefault(newest.group, deque(maxlen=NUM_WINDOWS + 1))
        if not windows or last_s - windows[-1].began_s > WINDOW_S:
            windows.append(_Window(last_s))
        window = windows[-1]
        window.num += 1
        window.newest, window.newest_s = newest, max(window.newest_s, last_s)
        gap_s = last_s - arrivals[-2][0]
        window.lost_s[last] = window.lost_s.get(last, 0.0) + gap_s
        window.times_last[last] = window.times_last.get(last, 0) + 1
        self._transfer(ranks, last_s, newest)

    def _transfer(self, ranks: dict[int, pb.Collective], last_s: float, newest: pb.Collective) -> None:
        # Who waits late also sees the end late: the first to see it is the nearest to the truth.
        ends = [one.finished_s for one in ranks.values() if one.HasField("finished_s")]
        if len(ends) < len(ranks):
            return
        took_s = max(0.0, min(ends) - last_s) if newest.op != "broadcast" else max(0.0, max(ends) - last_s)
        key = (newest.group, newest.op, newest.bytes.bit_length())
        link = self._links.get(key)
        if link is None:
            if len(self._links) >= MAX_LINKS:
                return
            link = self._links[key] = _Link(tuple(sorted(ranks)))
        link.newest = newest
        link.recent.append(took_s)
        if len(link.first) < NUM_BASELINE:
            link.first.append(took_s)
            if len(link.first) < NUM_BASELINE:
                return
            link.usual_s = statistics.median(link.first)
        median_s = statistics.median(link.recent)
        link.usual_s = min(link.usual_s, median_s)
        if self._slow(key, link, median_s):
            link.slow_since_s = link.slow_since_s or last_s
        else:
            link.slow_since_s = 0.0

    def _slow(self, key: tuple[str, str, int], link: _Link, median_s: float) -> bool:
        beside = [
            other.usual_s
            for (group, op, size), other in self._links.items()
            if (op, size) == key[1:] and group != key[0] and len(other.ranks) == len(link.ranks)
        ]
        usual_s = min([link.usual_s, *([statistics.median(beside)] if len(beside) > 1 else [])])
        return median_s > SLOWER * usual_s and median_s - usual_s > SLOWER_S

    def straggler(self, now_s: float) -> Straggler | None:
        """Return who holds up the others, if the last windows agree on it."""
        for group, windows in self._windows.items():
            if now_s - windows[-1].newest_s > 3 * WINDOW_S:
                continue  # nothing passes there: it is another's to say why
            full = [window for window in windows if window.newest_s - window.began_s > WINDOW_S / 2][-NUM_WINDOWS:]
            blamed = [window.blamed() for window in full]
            for rank in {one for one in blamed if one is not None}:
                mine = [window for window, one in zip(full, blamed, strict=True) if one == rank]
                if len(mine) < MIN_WINDOWS or blamed[-1] != rank:
                    continue
                lasted_s = sum(window.newest_s - window.began_s for window in mine)
                lost_s = sum(window.lost_s[rank] for window in mine)
                newest = mine[-1].newest
                assert newest is not None
                gap_s = lost_s / sum(window.times_last[rank] for window in mine)
                return Straggler(rank, group, newest.op, newest.seq, lost_s / lasted_s, gap_s, now_s - mine[0].began_s)
        return None

    def slow_link(self, now_s: float) -> SlowLink | None:
        """Return the group that has been slow the longest, two windows at least; the ranks that all such share."""
        slow = [
            (key, link)
            for key, link in self._links.items()
            if link.slow_since_s
            and link.newest is not None
            and link.newest.enqueued_s - link.slow_since_s > 2 * WINDOW_S
        ]
        slow = [one for one in slow if one[1].newest and now_s - one[1].newest.enqueued_s < 3 * WINDOW_S]
        if not slow:
            return None
        (group, op, _), link = min(slow, key=lambda one: one[1].slow_since_s)
        shared = set.intersection(*(set(other.ranks) for _, other in slow)) or set(link.ranks)
        assert link.newest is not None
        return SlowLink(
            group,
            op,
            link.newest.seq,
            link.newest.bytes,
            statistics.median(link.recent),
            link.usual_s,
            tuple(sorted(shared)),
            now_s - link.slow_since_s,
        )
