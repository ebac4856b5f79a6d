"""The columns of a roll-up: made of what a daemon knows of its ranks, and joined without being read.

The standard library's arrays do: a node has few ranks. Only the head, which has all of them, reads them with numpy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from math import nan
from typing import Any

from distui.core.telemetry.kinds import DEBUGGER, INPUT
from distui.daemon.diagnosis.observe import DEAD, FINISHED, RUNNING, STOPPED, Observed
from distui.daemon.runs.state import RankRecord
from distui.proto import rollup_pb2 as up
from distui.proto import telemetry_pb2 as pb

STATES = (RUNNING, STOPPED, DEAD, FINISHED)
PHASES = ("", "setup", "data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "idle", INPUT, DEBUGGER)
RANKS = {
    "rank": "I",
    "pid": "I",
    "state": "B",
    "phase": "B",
    "step": "Q",
    "total_steps": "Q",
    "step_s": "f",
    "data_wait_s": "f",
    "forward_s": "f",
    "backward_s": "f",
    "exposed_comm_s": "f",
    "optimizer_s": "f",
    "tokens_per_s": "f",
    "samples_per_s": "f",
    "loss": "f",
    "grad_norm": "f",
    "learning_rate": "f",
    "memory_bytes": "Q",
    "device_bytes": "Q",
    "phase_age_s": "f",
    "seen_age_s": "f",
}
"""The columns with an entry a rank, and the type code of `array`, which numpy reads too."""
ENTERED = {"entered_rank": "I", "entered_group": "Q", "entered_seq": "Q"}
WAITING = {
    "waiting_rank": "I",
    "waiting_group": "Q",
    "waiting_op": "Q",
    "waiting_seq": "Q",
    "waiting_age_s": "f",
}
ALL = {**RANKS, **ENTERED, **WAITING}
UNKNOWN = 2**64 - 1
"""An integer that is not available."""
WAITS_S = 0.5
"""Who is blocked for less is not told of: every step waits a little."""
_PARTS = ("data_wait_s", "forward_s", "backward_s", "optimizer_s")


@lru_cache(maxsize=1 << 14)
def hash_of(name: str) -> int:
    """Return what stands for a name in columns; the same on every node."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def roll_up(
    pairs: Iterable[tuple[RankRecord, Observed]], now_s: float
) -> tuple[up.RolledNode, up.RankColumns, dict[int, str]]:
    """Return the counts of a node, the columns of its ranks, and the names that their hashes stand for."""
    columns: dict[str, array[Any]] = {name: array(code) for name, code in ALL.items()}
    names: dict[int, str] = {}

    def known(name: str) -> int:
        names[found := hash_of(name)] = name
        return found

    for record, seen in pairs:
        for name, value in _row(record, seen, now_s).items():
            columns[name].append(value)
        for group, seq in seen.last_seq.items():
            columns["entered_rank"].append(seen.rank)
            columns["entered_group"].append(known(group))
            columns["entered_seq"].append(seq)
        if (wait := seen.wait) is not None and seen.process not in (DEAD, FINISHED) and now_s - wait.since_s >= WAITS_S:
            columns["waiting_rank"].append(seen.rank)
            columns["waiting_group"].append(known(wait.group))
            columns["waiting_op"].append(known(wait.op))
            columns["waiting_seq"].append(wait.seq)
            columns["waiting_age_s"].append(now_s - wait.since_s)
    if sys.byteorder == "big":
        for column in columns.values():
            column.byteswap()
    node = up.RolledNode(
        num_ranks=len(columns["rank"]),
        num_entered=len(columns["entered_rank"]),
        num_waiting=len(columns["waiting_rank"]),
    )
    return node, up.RankColumns(**{name: column.tobytes() for name, column in columns.items()}), names


def _row(record: RankRecord, seen: Observed, now_s: float) -> dict[str, int | float]:
    step, memory = record.last_step or pb.Step(), record.memory or pb.Memory()
    row: dict[str, int | float] = {
        "rank": seen.rank,
        "pid": seen.pid,
        "state": STATES.index(seen.process),
        "phase": PHASES.index(seen.phase) if seen.phase in PHASES else 0,
        "step": seen.step or UNKNOWN,
        "total_steps": step.total_steps,
        "exposed_comm_s": step.exposed_comm_s,
        "phase_age_s": now_s - seen.phase_since_s if seen.phase_since_s else nan,
        "seen_age_s": now_s - record.last_seen_s if record.last_seen_s else nan,
        "loss": record.loss if record.loss is not None else nan,
        "memory_bytes": UNKNOWN,
        "device_bytes": memory.device_total_bytes or UNKNOWN,
    }
    if memory.HasField("allocated_bytes") or memory.HasField("rss_bytes"):
        row["memory_bytes"] = memory.allocated_bytes if memory.HasField("allocated_bytes") else memory.rss_bytes
    for name in ("grad_norm", "learning_rate"):
        row[name] = getattr(step, name) if step.HasField(name) else nan
    row["step_s"] = row["tokens_per_s"] = row["samples_per_s"] = nan
    if record.recent:
        time_s, tokens, samples = (sum(part) for part in zip(*record.recent, strict=True))
        row["step_s"] = time_s / len(record.recent)
        if time_s > 0:
            row["tokens_per_s"] = tokens / time_s if tokens else nan
            row["samples_per_s"] = samples / time_s if samples else nan
    sums = [sum(part) for part in zip(*(parts for _, parts in record.last_parts), strict=True)] or [0.0] * len(_PARTS)
    for name, total in zip(_PARTS, sums, strict=True):
        row[name] = total / max(1, len(record.last_parts))
    return row


def join(parts: list[up.RankColumns]) -> up.RankColumns:
    """Return the columns of several nodes, one below the other."""
    if len(parts) == 1:
        return parts[0]
    return up.RankColumns(**{name: b"".join(getattr(part, name) for part in parts) for name in ALL})
