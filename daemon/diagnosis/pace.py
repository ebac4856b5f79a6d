"""Who holds up the others all the time, and which group has become slow: from the collectives that all have told of.

Synchronous training makes all ranks' steps equally long, so a straggler shows in who arrives last, and by how much.
What ranks do alike can be compared; who has another part than the others in each step is no straggler:

- it is the source of a broadcast, or the destination of a gather, in a group that does little else: a learner and its
  actors. The others wait for what it makes, by design; the actors are compared with each other.
- it is last in one place of the step, and at another it waits for all others: they take turns.
- it was blocked in another group for as long as it is late: it is not the one who is slow (a stage of a pipeline, the
  neighbour of the slow rank in a group for tensor parallelism).

A slow link shows in the time from the last arrival to the end, against what the same collective took before, or what
it takes in the groups beside.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from distui.proto import telemetry_pb2 as pb

WINDOW_S = 2.0
MAX_WINDOW_S = 60.0
NUM_WINDOWS, MIN_WINDOWS = 8, 3
"""A verdict needs this many of the last windows to agree, and most of those in which anything was lost."""
MIN_COLLECTIVES = 4
"""A window lasts until it has so many: with steps of seconds and one collective in each, longer than `WINDOW_S`."""
LOST_SHARE = 0.08
"""A straggler costs the others at least this share of their time."""
BLAME_SHARE = 0.75
"""And at least this share of all time that ranks waited for late ones."""
WITH_SHARE = 0.5
"""Who costs more than this share of what the worst does is late with it: the two ranks of one slow host."""
NUM_RECENT = 8
SLOWER, SLOWER_S = 4.0, 0.005
CALM = 2.0
"""A link that was slow is so until it takes less than so many times the usual, for a window."""
SLOWER_ALL_S = SLOWER_S / 2
"""What the fastest of the last transfers takes longer, too: a slow link slows each, a busy processor only some."""
MIN_LINK_BYTES = 32 << 10
"""What is smaller tells of the latency of processes, not of a link."""
NUM_BASELINE = 24
MAX_LINKS = 256
MAX_EXCUSES = 256
TURN_SHARE = 0.04
"""Who waits for all others for more than this share of the time, where it is not late itself, has a part of its own."""
ROOTED = frozenset({"broadcast", "scatter", "gather", "reduce"})
"""Operations in which one rank gives to, or takes from, all others."""
_POINT_TO_POINT = frozenset({"send", "recv"})


@dataclass(frozen=True, slots=True)
class Straggler:
    """Ranks that the others wait for again and again."""

    ranks: tuple[int, ...]
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
    total_s: float = 0.0
    lost_s: dict[int, float] = field(default_factory=dict)
    times_late: dict[int, int] = field(default_factory=dict)
    ahead_s: dict[int, float] = field(default_factory=dict)
    """How long ranks waited for all others: the mirror of `lost_s`."""
    all_ahead_s: float = 0.0
    ahead_while_late_s: dict[int, float] = field(default_factory=dict)
    newest: pb.Collective | None = None

    @property
    def lasted_s(self) -> float:
        return self.newest_s - self.began_s

    def lossy(self) -> bool:
        """Tell whether a part of its time that counts was lost."""
        return self.total_s > LOST_SHARE / 2 * self.lasted_s

    def blames(self, rank: int) -> bool:
        """Tell whether most of what was lost was lost to one rank, or to several of which it is one."""
        return self.lost_s.get(rank, 0.0) > BLAME_SHARE * self.total_s

    def takes_turns(self, rank: int) -> bool:
        """Tell whether a rank, where it was not late, mostly was the one that waited for all others."""
        ahead_s = self.ahead_s.get(rank, 0.0)
        others_s = self.all_ahead_s - self.ahead_while_late_s.get(rank, 0.0) - ahead_s
        return ahead_s > TURN_SHARE * self.lasted_s and ahead_s > others_s


@dataclass(slots=True)
class _Kinds:
    """What a group has sent by operations in which one rank gives or takes, and by those that are alike for all."""

    rooted_bytes: int = 0
    alike_bytes: int = 0


@dataclass(slots=True)
class _Link:
    ranks: tuple[int, ...]
    usual_s: float = math.inf
    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    slow_since_s: float = 0.0
    slow_until_s: float = 0.0
    slow_took_s: float = 0.0
    """What it took when it was slow last: it may be calm just now."""
    newest: pb.Collective | None = None


class Pace:
    """Takes in each collective once all ranks of its group have told of it."""

    def __init__(self) -> None:
        self._windows: dict[str, deque[_Window]] = {}
        self._kinds: dict[str, _Kinds] = {}
        self._links: dict[tuple[str, str, int], _Link] = {}
        self._excuses: deque[tuple[int, float, float]] = deque(maxlen=MAX_EXCUSES)

    def excuse(self, rank: int, began_s: float, ended_s: float) -> None:
        """Take in that a rank waited for a person, or evaluated: what it was late by then says nothing of it."""
        if self._excuses and self._excuses[-1][:2] == (rank, began_s):
            self._excuses.pop()  # it goes on
        self._excuses.append((rank, began_s, ended_s))

    def add(
        self, ranks: dict[int, pb.Collective], elsewhere_s: Mapping[int, float] | None = None
    ) -> list[tuple[float, int]]:
        """Take in what every member told of one collective; return when each arrived, sorted.

        `elsewhere_s`: how long those that were blocked in other groups since the last collective of this one were so.
        """
        arrivals = sorted((one.enqueued_s, rank) for rank, one in ranks.items())
        last_s, last = arrivals[-1]
        newest = ranks[last]
        if newest.bytes >= MIN_LINK_BYTES:
            self._transfer(ranks, last_s, newest)
        if newest.op in _POINT_TO_POINT:
            return arrivals  # whoever receives waits by design: a pipeline's stage, a learner for what is rolled out
        first_s = arrivals[0][0]
        if self._excuses and any(
            rank in ranks and first_s < end and ranks[rank].enqueued_s > begin for rank, begin, end in self._excuses
        ):
            return arrivals
        window = self._window(newest, last_s)
        # Those behind the widest gap are late, at most half of them: ranks of one slow host are late together.
        alike = self._alike(ranks, arrivals, newest)
        late, late_s = _apart(alike[::-1])
        ahead, ahead_s = _apart(arrivals)
        window.all_ahead_s += ahead_s
        for rank in ahead:
            window.ahead_s[rank] = window.ahead_s.get(rank, 0.0) + ahead_s
        if not late:
            return arrivals
        usual_s = 0.0
        if elsewhere_s:
            usual_s = sum(elsewhere_s.get(rank, 0.0) for _, rank in alike if rank not in late) / (
                len(alike) - len(late)
            )
        most_s = 0.0
        for rank in late:
            own_s = late_s
            if elsewhere_s:
                own_s = min(late_s, max(0.0, late_s - elsewhere_s.get(rank, 0.0) + usual_s))
            most_s = max(most_s, own_s)
            window.lost_s[rank] = window.lost_s.get(rank, 0.0) + own_s
            window.times_late[rank] = window.times_late.get(rank, 0) + 1
            window.ahead_while_late_s[rank] = window.ahead_while_late_s.get(rank, 0.0) + ahead_s
        window.total_s += most_s
        return arrivals

    def _window(self, newest: pb.Collective, last_s: float) -> _Window:
        """Return the window that a collective falls into, which counts it."""
        windows = self._windows.get(newest.group)
        if windows is None:
            windows = self._windows[newest.group] = deque(maxlen=NUM_WINDOWS + 1)
        window = windows[-1] if windows else None
        if window is None or last_s - window.newest_s > MAX_WINDOW_S:
            window = _Window(last_s)
            windows.append(window)
        elif last_s - window.began_s > WINDOW_S and window.num >= MIN_COLLECTIVES:
            window = _Window(window.newest_s)
            windows.append(window)
        window.num += 1
        window.newest, window.newest_s = newest, max(window.newest_s, last_s)
        return window

    def _alike(
        self, ranks: dict[int, pb.Collective], arrivals: list[tuple[float, int]], newest: pb.Collective
    ) -> list[tuple[float, int]]:
        """Return the arrivals without that of the source or destination, in a group where such is the rule."""
        kinds = self._kinds.get(newest.group)
        if kinds is None:
            kinds = self._kinds[newest.group] = _Kinds()
        if newest.op not in ROOTED:
            kinds.alike_bytes += newest.bytes
            return arrivals
        kinds.rooted_bytes += max(one.bytes for one in ranks.values())
        if kinds.rooted_bytes <= 2 * kinds.alike_bytes:
            return arrivals  # buffers from rank 0, a loss to it: all train alike
        return [one for one in arrivals if not ranks[one[1]].is_root]

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
        usual_s = self._usual_s(key, link)
        if min(link.recent) > max(CALM * usual_s, usual_s + SLOWER_ALL_S):
            slower, more_s = median_s / max(usual_s, 1e-9), median_s - usual_s
        else:
            slower, more_s = 0.0, 0.0
        if slower > SLOWER and more_s > SLOWER_S:
            link.slow_since_s, link.slow_until_s, link.slow_took_s = link.slow_since_s or last_s, last_s, median_s
        elif slower > CALM and link.slow_since_s:
            link.slow_until_s, link.slow_took_s = last_s, median_s
        elif last_s - link.slow_until_s > WINDOW_S:
            link.slow_since_s = 0.0

    def _usual_s(self, key: tuple[str, str, int], link: _Link) -> float:
        """Return what a transfer took, or takes in the groups beside."""
        beside = [
            other.usual_s
            for (group, op, size), other in self._links.items()
            if (op, size) == key[1:] and group != key[0] and len(other.ranks) == len(link.ranks)
        ]
        return min([link.usual_s, *([statistics.median(beside)] if len(beside) > 1 else [])])

    def straggler(self, now_s: float) -> Straggler | None:
        """Return who holds up the others, if the last windows agree on it."""
        for group, windows in self._windows.items():
            full = [one for one in windows if one.lasted_s > WINDOW_S / 2 and one.num >= MIN_COLLECTIVES]
            if not full or now_s - windows[-1].newest_s > 3 * max(WINDOW_S, full[-1].lasted_s):
                continue  # nothing passes there: it is another's to say why
            lossy, lasted_s = [one for one in full if one.lossy()], sum(one.lasted_s for one in full)
            found = []
            for rank in {rank for one in lossy for rank in one.lost_s}:
                mine = [one for one in lossy if one.blames(rank)]
                if 2 * sum(one.takes_turns(rank) for one in mine) > len(mine):
                    continue
                lost_s = sum(one.lost_s.get(rank, 0.0) for one in full)
                if len(mine) >= max(MIN_WINDOWS, BLAME_SHARE * len(lossy)) and lost_s > LOST_SHARE * lasted_s:
                    found.append((rank, lost_s, mine))
            if found:
                worst, lost_s, mine = max(found, key=lambda one: one[1])
                costs = {rank: sum(one.lost_s.get(rank, 0.0) for one in mine) for one in mine for rank in one.lost_s}
                late = tuple(sorted(rank for rank, cost_s in costs.items() if cost_s > WITH_SHARE * costs[worst]))
                newest = full[-1].newest
                assert newest is not None
                gap_s = sum(one.total_s for one in mine) / sum(max(one.times_late.values()) for one in mine)
                return Straggler(late, group, newest.op, newest.seq, lost_s / lasted_s, gap_s, now_s - mine[0].began_s)
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
            link.slow_took_s,
            link.usual_s,
            tuple(sorted(shared)),
            now_s - link.slow_since_s,
        )


def _apart(arrivals: list[tuple[float, int]]) -> tuple[list[int], float]:
    """Return the ranks before the widest gap in the first half of a sorted list, and that gap."""
    widest, before_s, number = 0.0, arrivals[0][0] if arrivals else 0.0, 0
    for at in range(1, len(arrivals) // 2 + 1):
        arrived_s = arrivals[at][0]
        gap_s = abs(arrived_s - before_s)
        if gap_s >= widest:
            widest, number = gap_s, at
        before_s = arrived_s
    return [rank for _, rank in arrivals[:number]], widest
