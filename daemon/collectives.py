"""Counts a run's collectives by (group, op), and how late each rank arrives at them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from distui.proto import telemetry_pb2 as pb

_MAX_OPEN = 8192


@dataclass(slots=True)
class _Counts:
    count: dict[int, int] = field(default_factory=dict)
    num_bytes: dict[int, int] = field(default_factory=dict)
    timed: int = 0
    total_s: float = 0.0
    max_s: float = 0.0
    blocked_s: float = 0.0
    last_seq: dict[int, int] = field(default_factory=dict)
    lateness: dict[int, tuple[float, int]] = field(default_factory=dict)


class CollectiveTable:
    """One line for each (group, op). `count` and `bytes` are those of the rank that entered most."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = {}
        self._arrivals: OrderedDict[tuple[str, str, int], dict[int, float]] = OrderedDict()

    def add(self, rank: int, collective: pb.Collective) -> None:
        """Take one rank's account of one collective."""
        key = (collective.group, collective.op)
        counts = self._counts.setdefault(key, _Counts())
        counts.count[rank] = counts.count.get(rank, 0) + 1
        counts.num_bytes[rank] = counts.num_bytes.get(rank, 0) + collective.bytes
        counts.blocked_s += collective.blocked_s
        counts.last_seq[rank] = max(collective.seq, counts.last_seq.get(rank, 0))
        if collective.HasField("finished_s"):
            began_s = collective.started_s if collective.HasField("started_s") else collective.enqueued_s
            duration_s = max(0.0, collective.finished_s - began_s)
            counts.timed += 1
            counts.total_s += duration_s
            counts.max_s = max(counts.max_s, duration_s)
        at = (*key, collective.seq)
        arrivals = self._arrivals.setdefault(at, {})
        arrivals[rank] = collective.enqueued_s
        if len(arrivals) >= max(collective.group_size, 1):
            self._close(at)
        elif len(self._arrivals) > _MAX_OPEN:
            self._arrivals.popitem(last=False)  # some rank never told it: nobody's lateness can be said

    def summaries(self) -> list[pb.CollectiveSummary]:
        """Return the lines, by group and operation."""
        return [_summary(key, counts) for key, counts in sorted(self._counts.items())]

    def _close(self, at: tuple[str, str, int]) -> None:
        arrivals = self._arrivals.pop(at)
        if len(arrivals) < 2:
            return
        first_s = min(arrivals.values())
        lateness = self._counts[at[:2]].lateness
        for rank, arrived_s in arrivals.items():
            total_s, count = lateness.get(rank, (0.0, 0))
            lateness[rank] = (total_s + arrived_s - first_s, count + 1)


def _summary(key: tuple[str, str], counts: _Counts) -> pb.CollectiveSummary:
    return pb.CollectiveSummary(
        group=key[0],
        op=key[1],
        count=max(counts.count.values()),
        bytes=max(counts.num_bytes.values()),
        mean_s=counts.total_s / counts.timed if counts.timed else 0.0,
        max_s=counts.max_s,
        blocked_s=counts.blocked_s,
        last_seq=counts.last_seq,
        lateness_s={rank: total_s / count for rank, (total_s, count) in counts.lateness.items()},
    )
