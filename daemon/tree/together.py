"""What is wrong across nodes, told by the columns of all ranks: who is waited for, who is late, what disagrees.

The verdicts and their words are those of `diagnosis/`, which has a run's ranks as objects and reads their ledgers; here
a thousand nodes say each second what their ranks have entered, and where they wait. Order is that of the collectives'
numbers; clocks only say for how long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distui.daemon.diagnosis.busy import PATIENT_PHASES, PATIENT_S
from distui.daemon.diagnosis.hangs import DISAGREE_S, HANG_S, HANG_STEPS
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, group_members
from distui.daemon.tree.columns import PHASES, STATES, UNKNOWN
from distui.proto import telemetry_pb2 as pb

Array = npt.NDArray[Any]
SILENT_S = 10.0
"""A node that has not rolled up for so long is told."""
LATE_SHARE = 0.15
"""Who works longer than the others by this share of a step is late."""
LATE_ROLLS = 5
MAX_PLACES = 512
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Together:
    """All ranks now. Arrays have an entry a rank, but for `entered`, `waiting_since_s` and `heard_ago_s`."""

    run_id: str
    world_size: int
    there: Array
    state: Array
    step: Array
    phase: Array
    host_of: Array
    hosts: list[str]
    heard_ago_s: Array
    gone: frozenset[int]
    """Hosts that have not been heard for `SILENT_S`."""
    names: dict[int, str]
    entered: dict[str, Array]
    waiting_since_s: Array
    own_s: Array
    step_s: Array
    late: Array
    p99_s: float
    now_s: float

    def is_in(self, state: str) -> Array:
        """Return which ranks are in a state."""
        return np.asarray(self.there & (self.state == STATES.index(state)))

    def words(self, ranks: Array) -> str:
        """Return `rank 3 on node1`, or `ranks 1, 2 and 5 more`, with the hosts of a few."""
        if len(ranks) == 1:
            return f"rank {ranks[0]} on {self.host(ranks[0])}"
        shown = ", ".join(str(rank) for rank in ranks[:_NAMED])
        hosts = list(dict.fromkeys(self.host(rank) for rank in ranks))
        where = f" on {', '.join(hosts[:_NAMED])}" if len(hosts) <= _NAMED else f" of {len(hosts)} hosts"
        return f"ranks {shown}{f' and {len(ranks) - _NAMED:,} more' if len(ranks) > _NAMED else ''}{where}"

    def host(self, rank: int) -> str:
        """Return the host of a rank."""
        return self.hosts[self.host_of[rank]]


def diagnose(seen: Together) -> list[pb.Diagnosis]:
    """Return what is wrong, the cause first."""
    found = [_silent(seen, host) for host in sorted(seen.gone)]
    if not len(seen.there) or not seen.there.any():
        return found
    dead = seen.is_in(DEAD).any()
    if not found and not dead:
        found = _hang(seen)
    if not found and not dead:
        found = _straggler(seen)
    return found


def _silent(seen: Together, host: int) -> pb.Diagnosis:
    ranks = np.flatnonzero(seen.host_of == host)
    ago_s = float(seen.heard_ago_s[host])
    span = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}" if len(ranks) else "no ranks"
    message = (
        f"nothing has come from {seen.hosts[host]} ({span}) for {ago_s:.0f} s: its link or its daemon is down, or the "
        "host is; what its ranks do is not known"
    )
    return pb.Diagnosis(kind="silent_host", ranks=ranks.tolist(), since_s=ago_s, message=message)


def _hang(seen: Together) -> list[pb.Diagnosis]:
    """Follow who waits for whom to those that are waited for and wait for none."""
    waits = _Waits(seen)
    stopped = np.flatnonzero(seen.is_in(STOPPED))
    longest_s = seen.now_s - waits.since_s.min() if len(waits.rank) else 0.0
    patient = np.isin(seen.phase[seen.there], [PHASES.index(name) for name in PATIENT_PHASES]).any()
    first = (seen.step[seen.there] == UNKNOWN).any()
    limit_s = max(HANG_S, HANG_STEPS * seen.p99_s, PATIENT_S if patient or first else 0.0)
    if len(stopped) and longest_s > HANG_S:
        held = f"; {len(waits.rank):,} ranks wait" if len(waits.rank) else ""
        message = f"{seen.words(stopped)} {_are(stopped)} stopped by a signal{held}; kill -CONT there lets them go on"
        return [pb.Diagnosis(kind="hang", ranks=stopped.tolist(), since_s=longest_s, message=message)]
    if (differs := waits.mismatch()) is not None:
        return [differs]
    if longest_s <= limit_s:
        return []
    is_waiting = np.zeros(len(seen.there), bool)
    is_waiting[waits.rank] = True
    culprits = np.zeros(len(seen.there), bool)
    place: tuple[int, int] | None = None
    circle = False
    for group, seq in waits.places():
        lacking = waits.lacking(group, seq)
        free = lacking & ~is_waiting
        circle = circle or bool(lacking.any())
        if free.any():
            place = place or (group, seq)
            culprits |= free
    if place is not None:
        return [_waited_for(seen, waits, np.flatnonzero(culprits), *place)]
    if circle:
        some = "; ".join(waits.text(at) for at in range(min(_NAMED, len(waits.rank))))
        message = (
            f"ranks wait for each other in a circle: {some}; they call collectives in different orders: look for a "
            "branch, or an order of set or dict, that differs between ranks"
        )
        return [pb.Diagnosis(kind="hang", ranks=waits.rank[:1024].tolist(), since_s=longest_s, message=message)]
    group, seq = waits.places()[0]
    mine = waits.at(group, seq)
    if seen.there.sum() < seen.world_size or seen.now_s - waits.since_s[mine].max() < HANG_S:
        return []  # not all are seen, or the last has only just come
    message = (
        f"all ranks have entered {waits.words(group, seq)} and it does not end: the network or the backend is stuck; "
        f"distui control {seen.run_id} stacks shows where"
    )
    return [waits.told("hang", waits.rank[mine], group, seq, message)]


def _waited_for(seen: Together, waits: _Waits, culprits: Array, group: int, seq: int) -> pb.Diagnosis:
    held = waits.rank[waits.at(group, seq)]
    left = culprits[seen.state[culprits] == STATES.index(FINISHED)]
    since_s = seen.now_s - waits.since_s[waits.at(group, seq)].min()
    if len(left):
        message = (
            f"{seen.words(left)} ended while others wait: {seen.words(held)} {_are(held)} in {waits.words(group, seq)}"
            "; give all ranks as many batches, and let all leave the loop in the same step"
        )
        return waits.told("left_early", left, group, seq, message)
    first = culprits[0]
    phase = PHASES[seen.phase[first]] or "an unknown phase"
    after = f", after step {seen.step[first]}" if seen.step[first] != UNKNOWN else ""
    message = (
        f"{seen.words(culprits)} {'has' if len(culprits) == 1 else 'have'} not entered {waits.words(group, seq)} for "
        f"{since_s:.0f} s (last known in {phase}{after}); {seen.words(held)} wait{'s' * (len(held) == 1)} there; "
        f"distui status {seen.run_id} --node {seen.host(first)} shows that host, distui control {seen.run_id} stacks "
        "where its ranks are"
    )
    return waits.told("data_stall" if phase == "data" else "hang", culprits, group, seq, message)


class _Waits:
    """Who is blocked in what, by row; only of hosts that are heard, and of ranks that live."""

    def __init__(self, seen: Together) -> None:
        self._seen = seen
        rows, rank = seen.entered, seen.entered["waiting_rank"].astype(np.int64)
        gone = np.isin(seen.host_of[rank], list(seen.gone)) if len(rank) else np.zeros(0, bool)
        alive = ~np.isin(seen.state[rank], (STATES.index(DEAD), STATES.index(FINISHED)))
        kept = alive & ~gone & (seen.now_s - seen.waiting_since_s > DISAGREE_S)
        order = np.argsort(seen.waiting_since_s[kept], kind="stable")
        self.rank, self.since_s = rank[kept][order], seen.waiting_since_s[kept][order]
        self.group, self.op, self.seq = (rows[f"waiting_{name}"][kept][order] for name in ("group", "op", "seq"))

    def places(self) -> list[tuple[int, int]]:
        """Return the collectives that are waited in, the longest first."""
        return list(dict.fromkeys(zip(self.group.tolist(), self.seq.tolist(), strict=True)))[:MAX_PLACES]

    def at(self, group: int, seq: int) -> Array:
        """Return which rows wait in one collective."""
        return np.asarray((self.group == group) & (self.seq == seq))

    def words(self, group: int, seq: int) -> str:
        """Return `all_reduce #17 of data_parallel`."""
        op = int(self.op[self.at(group, seq)][0])
        return f"{self._name(op)} #{seq} of {self._name(group)}"

    def text(self, at: int) -> str:
        """Return `rank 3 in all_reduce #17 of data_parallel`."""
        op, group = self._name(int(self.op[at])), self._name(int(self.group[at]))
        return f"rank {self.rank[at]} in {op} #{self.seq[at]} of {group}"

    def _name(self, number: int) -> str:
        return self._seen.names.get(number, "?")

    def lacking(self, group: int, seq: int) -> Array:
        """Return which ranks are of the group, as far as is known, and have not entered the collective."""
        seen, rows = self._seen, self._seen.entered
        last, has = np.zeros(len(seen.there), np.uint64), np.zeros(len(seen.there), bool)
        mine = rows["entered_group"] == group
        last[rows["entered_rank"][mine]] = rows["entered_seq"][mine]
        has[rows["entered_rank"][mine]] = True
        members = group_members(self._name(group))
        if members is not None:
            of = np.zeros(len(seen.there), bool)
            of[[rank for rank in members if rank < len(of)]] = True
        else:
            of = seen.there if self._name(group) == "world" else has
        return np.asarray(of & seen.there & (last < np.uint64(seq)))

    def mismatch(self) -> pb.Diagnosis | None:
        """Return that ranks wait in the same place of a group in different operations, which never ends well."""
        if not len(self.rank):
            return None
        keys = np.stack([self.group, self.seq.astype(np.uint64)])
        _, places = np.unique(keys, axis=1, return_inverse=True)
        places = places.ravel()
        for place in np.unique(places)[:MAX_PLACES]:
            mine = places == place
            ops, firsts, counts = np.unique(self.op[mine], return_index=True, return_counts=True)
            names = {self._name(int(op)) for op in ops}
            if len(ops) < 2 or names == {"send", "recv"}:
                continue
            few = ops[np.argmin(counts)]
            ranks = np.sort(self.rank[mine & (self.op == few)])
            group, seq = int(self.group[mine][0]), int(self.seq[mine][0])
            parts = "; ".join(
                f"{count:,} rank{'s' * int(count > 1)} from rank {self.rank[mine][first]} on: {self._name(int(op))}"
                for op, first, count in zip(ops, firsts, counts, strict=True)
            )
            message = (
                f"ranks disagree on #{seq} of {self._name(group)}: {parts}; look for a branch that not all ranks take"
            )
            return self.told("mismatch", ranks, group, seq, message)
        return None

    def told(self, kind: str, ranks: Array, group: int, seq: int, message: str) -> pb.Diagnosis:
        """Return a verdict on one collective."""
        mine = self.at(group, seq)
        since_s = float(self._seen.now_s - self.since_s[mine].min())
        op = self._name(int(self.op[mine][0]))
        return pb.Diagnosis(
            kind=kind,
            ranks=ranks[:1024].tolist(),
            collective=op,
            group=self._name(group),
            seq=seq,
            since_s=since_s,
            message=message,
        )


def _straggler(seen: Together) -> list[pb.Diagnosis]:
    late = np.flatnonzero(seen.there & (seen.late >= LATE_ROLLS))
    if not len(late) or len(late) * 4 > seen.there.sum():
        return []  # where a quarter is late, there is no usual pace to be late against
    usual_s, step_s = float(np.median(seen.own_s[seen.there])), float(np.nanmedian(seen.step_s[seen.there]))
    late = late[np.argsort(-seen.own_s[late])]
    lost_s = float(seen.own_s[late[0]]) - usual_s
    message = (
        f"{seen.words(late)} {'is' if len(late) == 1 else 'are'} slow: own work takes {seen.own_s[late[0]]:.3g} s a "
        f"step and that of others {usual_s:.3g} s, which costs all {lost_s / step_s:.0%} of each step; distui status "
        f"{seen.run_id} --node {seen.host(late[0])} shows that host"
    )
    return [
        pb.Diagnosis(kind="straggler", ranks=late[:1024].tolist(), since_s=float(seen.late[late[0]]), message=message)
    ]


def _are(ranks: Array) -> str:
    return "is" if len(ranks) == 1 else "are"
