"""What the ranks' collectives add up to: counts and times by (group, operation), who arrives late, who disagrees."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from distui.daemon.diagnosis.pace import Pace
from distui.proto import telemetry_pb2 as pb

MAX_OPEN = 1024
"""Sequence numbers of a group that wait for the records of its other ranks."""
MAX_KINDS = 512
SAME_BYTES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "transfer"})
"""Operations in which every rank must bring as much as the others."""
MIN_TO_BLAME = 3


@dataclass(slots=True)
class _Totals:
    count: int = 0
    bytes: int = 0
    time_s: float = 0.0
    num_timed: int = 0
    max_s: float = 0.0
    blocked_s: float = 0.0
    num_compared: int = 0
    late_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Ranks that brought something else than the others to the same place; all of them where none can be blamed."""

    group: str
    seq: int
    op: str
    ranks: tuple[int, ...]
    time_s: float
    what: str


MAX_BYTES = (1 << 64) - 1
"""That a message can hold: sources that lie may come to more."""


class CollectiveTotals:
    """The collectives of a run, summed up as they come."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], _Totals] = {}
        self._open: dict[str, OrderedDict[int, dict[int, tuple[pb.Collective, float]]]] = {}
        """group -> sequence number -> rank -> what it told, how long it was blocked elsewhere before."""
        self._blocked_s: dict[int, float] = {}
        """rank -> how long it has been blocked in collectives so far."""
        self._blocked_before: dict[str, dict[int, float]] = {}
        """group -> rank -> the same, up to the end of its last collective there."""
        self.last_seq: dict[str, dict[int, int]] = {}
        """group -> rank -> last sequence number known to be entered."""
        self.pace = Pace()
        self.mismatch: Mismatch | None = None
        """The first disagreement that was found."""

    def entered(self, rank: int, last_seq: dict[str, int]) -> None:
        """Take in a heartbeat's word on what a rank has entered."""
        for group, seq in last_seq.items():
            known = self.last_seq.setdefault(group, {})
            known[rank] = max(seq, known.get(rank, 0))

    def restarted(self, rank: int) -> None:
        """Forget where a rank was: its next incarnation counts from 1 again."""
        for known in self.last_seq.values():
            known.pop(rank, None)
        for waiting in self._open.values():
            for ranks in waiting.values():
                ranks.pop(rank, None)
        for before in self._blocked_before.values():
            before.pop(rank, None)

    def add(self, rank: int, collective: pb.Collective, world_size: int) -> None:
        """Take in one collective of one rank."""
        group, seq, op, blocked_s = collective.group, collective.seq, collective.op, collective.blocked_s
        known = self.last_seq.get(group)
        if known is None:
            known = self.last_seq[group] = {}
        if seq > known.get(rank, 0):
            known[rank] = seq
        totals = self._totals.get((group, op))
        if totals is None:
            if len(self._totals) >= MAX_KINDS:
                return
            totals = self._totals[group, op] = _Totals()
        totals.count += 1
        totals.bytes += collective.bytes
        totals.blocked_s += blocked_s
        if finished_s := collective.finished_s:  # 0 where it is not known
            took_s = finished_s - (collective.started_s or collective.enqueued_s)
            totals.num_timed += 1
            if took_s > 0.0:
                totals.time_s += took_s
                if took_s > totals.max_s:
                    totals.max_s = took_s
        before_s = self._blocked_s.get(rank, 0.0)
        self._blocked_s[rank] = before_s + blocked_s
        group_size = collective.group_size
        if 1 < group_size <= world_size:
            mine = self._blocked_before.setdefault(group, {})
            elsewhere_s = before_s - mine.get(rank, before_s)
            mine[rank] = before_s + blocked_s
            self._compare(rank, collective, totals, group_size, elsewhere_s)

    def _compare(
        self, rank: int, collective: pb.Collective, totals: _Totals, group_size: int, elsewhere_s: float
    ) -> None:
        group, seq = collective.group, collective.seq
        waiting = self._open.get(group)
        if waiting is None:
            waiting = self._open[group] = OrderedDict()
        ranks = waiting.get(seq)
        if ranks is None:
            ranks = waiting[seq] = {}
        ranks[rank] = collective, elsewhere_s
        if len(ranks) == group_size:
            del waiting[seq]
            op, num_bytes = collective.op, collective.bytes
            if any(one.op != op or one.bytes != num_bytes for one, _ in ranks.values()):  # or nothing can differ
                found = compare(group, seq, {r: (c.op, c.bytes) for r, (c, _) in ranks.items()})
                if found is not None:
                    self.mismatch = self.mismatch or Mismatch(*found[:4], collective.enqueued_s, found[4])
                    return
            told, elsewhere = {}, {}
            for number, (one, seconds) in ranks.items():
                told[number] = one
                if seconds:
                    elsewhere[number] = seconds
            arrivals = self.pace.add(told, elsewhere)
            totals.num_compared += 1
            first_s, late_s = arrivals[0][0], totals.late_s
            for arrived_s, number in arrivals:
                late_s[number] = late_s.get(number, 0.0) + arrived_s - first_s
        elif len(waiting) > MAX_OPEN:
            waiting.popitem(last=False)

    def summaries(self) -> list[pb.CollectiveSummary]:
        """Return one row a (group, operation)."""
        return [
            pb.CollectiveSummary(
                group=group,
                op=op,
                count=totals.count,
                bytes=min(totals.bytes, MAX_BYTES),
                mean_s=totals.time_s / totals.num_timed if totals.num_timed else 0.0,
                max_s=totals.max_s,
                blocked_s=totals.blocked_s,
                last_seq=self.last_seq.get(group, {}),
                lateness_s={rank: late_s / totals.num_compared for rank, late_s in totals.late_s.items()},
            )
            for (group, op), totals in sorted(self._totals.items())
        ]


def compare(
    group: str, seq: int, ranks: dict[int, tuple[str, int]], group_size: int = 0
) -> tuple[str, int, str, tuple[int, ...], str] | None:
    """Compare what ranks brought to one collective, rank -> (operation, bytes); None where they agree.

    None, too, where it hangs on those of a group of `group_size` that have not come yet who is to blame.
    Returns group, seq, the majority's operation, the ranks that differ from it (all, where fewer than three ranks or
    no majority leave nobody to blame), and in words what differs.
    """
    if {op for op, _ in ranks.values()} == {"send", "recv"} and len(ranks) == 2:
        ranks = {rank: ("transfer", num_bytes) for rank, (_, num_bytes) in ranks.items()}
    signatures = {rank: (op, num_bytes if op in SAME_BYTES else 0) for rank, (op, num_bytes) in ranks.items()}
    kinds = set(signatures.values())
    if len(kinds) < 2:
        return None
    by_kind = {kind: sorted(rank for rank, other in signatures.items() if other == kind) for kind in kinds}
    most = max(by_kind, key=lambda kind: len(by_kind[kind]))
    clear = len(ranks) >= MIN_TO_BLAME and 2 * len(by_kind[most]) > max(len(ranks), group_size)
    if not clear and len(ranks) < group_size:
        return None
    blamed = tuple(sorted(rank for rank, kind in signatures.items() if kind != most or not clear))
    words = []
    for (op, num_bytes), members in sorted(by_kind.items(), key=lambda item: item[1]):
        who = f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members[:8]))}"
        words.append(
            f"{who}{' ...' if len(members) > 8 else ''}: {op}{f' of {num_bytes:,} bytes' if num_bytes else ''}"
        )
    return group, seq, most[0], blamed, "; ".join(words)
