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


class CollectiveTotals:
    """The collectives of a run, summed up as they come."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], _Totals] = {}
        self._open: dict[str, OrderedDict[int, dict[int, tuple[pb.Collective, float]]]] = {}
        """group -> sequence number -> rank -> what it told, how long it was blocked elsewhere before."""
        self._blocked_s: dict[int, float] = {}
        """rank -> how long it has been blocked in collectives so far."""
        self._blocked_before: dict[tuple[str, int], float] = {}
        """(group, rank) -> the same, up to the end of its last collective there."""
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
        for key in [key for key in self._blocked_before if key[1] == rank]:
            del self._blocked_before[key]

    def add(self, rank: int, collective: pb.Collective, world_size: int) -> None:
        """Take in one collective of one rank."""
        group, seq = collective.group, collective.seq
        known = self.last_seq.get(group)
        if known is None:
            known = self.last_seq[group] = {}
        if seq > known.get(rank, 0):
            known[rank] = seq
        key = (group, collective.op)
        totals = self._totals.get(key)
        if totals is None:
            if len(self._totals) >= MAX_KINDS:
                return
            totals = self._totals[key] = _Totals()
        totals.count += 1
        totals.bytes += collective.bytes
        totals.blocked_s += collective.blocked_s
        if collective.HasField("finished_s"):
            began_s = collective.started_s if collective.HasField("started_s") else collective.enqueued_s
            took_s = max(0.0, collective.finished_s - began_s)
            totals.time_s += took_s
            totals.num_timed += 1
            totals.max_s = max(totals.max_s, took_s)
        blocked_s = self._blocked_s.get(rank, 0.0)
        self._blocked_s[rank] = after_s = blocked_s + collective.blocked_s
        if 1 < collective.group_size <= world_size:
            elsewhere_s = blocked_s - self._blocked_before.get((group, rank), blocked_s)
            self._blocked_before[group, rank] = after_s
            self._compare(rank, collective, collective.group_size, elsewhere_s)

    def _compare(self, rank: int, collective: pb.Collective, group_size: int, elsewhere_s: float) -> None:
        waiting = self._open.setdefault(collective.group, OrderedDict())
        ranks = waiting.setdefault(collective.seq, {})
        ranks[rank] = collective, elsewhere_s
        if len(ranks) == group_size:
            del waiting[collective.seq]
            found = compare(collective.group, collective.seq, {r: (c.op, c.bytes) for r, (c, _) in ranks.items()})
            if found is not None:
                self.mismatch = self.mismatch or Mismatch(*found[:4], collective.enqueued_s, found[4])
                return
            totals = self._totals[collective.group, collective.op]
            first_s = min(other.enqueued_s for other, _ in ranks.values())
            told = {number: other for number, (other, _) in ranks.items()}
            self.pace.add(told, {number: seconds for number, (_, seconds) in ranks.items()})
            totals.num_compared += 1
            for number, other in told.items():
                totals.late_s[number] = totals.late_s.get(number, 0.0) + other.enqueued_s - first_s
        elif len(waiting) > MAX_OPEN:
            waiting.popitem(last=False)

    def summaries(self) -> list[pb.CollectiveSummary]:
        """Return one row a (group, operation)."""
        return [
            pb.CollectiveSummary(
                group=group,
                op=op,
                count=totals.count,
                bytes=totals.bytes,
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
