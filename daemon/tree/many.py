"""The head's view of a job on many nodes: a row a rank in columns, one rank of each host for watchers.

Thousands of ranks as objects would cost the head more than a core; as columns they cost a few percent. What watchers
get is the sickest rank of each host, and whether the host is sick; the other ranks are asked for by the host's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distui.core.telemetry.harmless import harmless, make_harmless
from distui.daemon.diagnosis.observe import DEAD, FINISHED, STOPPED, launcher_alive
from distui.daemon.runs.batches import MAX_RANKS, Malformed
from distui.daemon.runs.folders import FINAL_STATES
from distui.daemon.runs.snapshot import STALLED, WAITING_S, was_cut
from distui.daemon.runs.state import RunState
from distui.daemon.tree.columns import ALL, ENTERED, PHASES, RANKS, STATES, UNKNOWN, WAITING
from distui.daemon.tree.together import LATE_SHARE, SILENT_S, Together, diagnose
from distui.proto import rollup_pb2 as up
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from distui.daemon.serve.live import LiveRun

Array = npt.NDArray[Any]
MAX_LOCAL = 64
"""Verdicts of single hosts that are shown; a cluster that loses its power has one for each."""
SICK = 100.0
"""From this score on a host is sick."""
_MEANS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "data_wait_s",
    "forward_s",
    "backward_s",
    "exposed_comm_s",
    "optimizer_s",
)
_OPTIONAL = ("loss", "grad_norm", "learning_rate")


@dataclass(slots=True)
class _Host:
    """One node as it last told of itself. Times are the head's, in Unix seconds."""

    state: pb.NodeState
    heard_s: float
    time_s: float
    skew_s: float
    diagnosis: list[pb.Diagnosis] = field(default_factory=list)
    entered: dict[str, Array] = field(default_factory=dict)
    waiting: dict[str, Array] = field(default_factory=dict)


class Many:
    """Takes in roll-ups; all on one event loop."""

    def __init__(self) -> None:
        self._columns: dict[str, Array] = {name: np.zeros(0, code) for name, code in RANKS.items()}
        self._host_of = np.zeros(0, np.int32)
        self._time_s = np.zeros(0)
        self._late = np.zeros(0, np.int32)
        """For how many roll-ups in a row a rank's own work took longer than that of the others."""
        self._hosts: list[_Host] = []
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._summed = 0

    # ---- taking in ---------------------------------------------------------------------------------------------------

    def take(self, roll: up.RollUp, now_s: float) -> None:
        """Take in a roll-up. Raises: Malformed, with nothing of it taken."""
        columns = {name: np.frombuffer(getattr(roll.ranks, name), code) for name, code in _DTYPES.items()}
        counts = [node.num_ranks for node in roll.nodes]
        sizes = {"num_entered": ENTERED, "num_waiting": WAITING, "num_ranks": RANKS}
        for name, kinds in sizes.items():
            total = sum(getattr(node, name) for node in roll.nodes)
            if any(len(columns[kind]) != total for kind in kinds):
                raise Malformed("a roll-up whose columns do not agree with its counts")
        ranks = columns["rank"]
        if len(ranks) and (int(ranks.max()) >= MAX_RANKS or int(columns["state"].max()) >= len(STATES)):
            raise Malformed("a roll-up of ranks that there cannot be")
        for number, name in roll.names.items():
            self._names.setdefault(number, harmless(name))
        ids = [self._host(node, now_s) for node in roll.nodes]
        if len(ranks):
            self._grow(int(ranks.max()) + 1)
            for name in RANKS:
                self._columns[name][ranks] = columns[name]
            self._host_of[ranks] = np.repeat(np.array(ids, np.int32), counts)
            self._time_s[ranks] = np.repeat([node.time_s for node in roll.nodes], counts)
        for kinds, name in ((ENTERED, "num_entered"), (WAITING, "num_waiting")):
            start = 0
            for host, node in zip(ids, roll.nodes, strict=True):
                stop = start + getattr(node, name)
                setattr(self._hosts[host], name[4:], {kind: columns[kind][start:stop] for kind in kinds})
                start = stop

    def _host(self, node: up.RolledNode, now_s: float) -> int:
        name = harmless(node.node)
        state = pb.NodeState(node=name, last_seen_s=node.time_s)
        if node.HasField("hardware"):
            state.hardware.CopyFrom(node.hardware)
        for told in node.diagnosis:
            make_harmless(told)
        host = _Host(state, now_s, node.time_s, node.skew_s, list(node.diagnosis))
        if (known := self._ids.get(name)) is not None:
            self._hosts[known] = host
            return known
        self._ids[name] = len(self._hosts)
        self._hosts.append(host)
        return self._ids[name]

    def _grow(self, size: int) -> None:
        if (more := size - len(self._host_of)) <= 0:
            return
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.zeros(more, column.dtype)])
        self._host_of = np.concatenate([self._host_of, np.full(more, -1, np.int32)])
        self._time_s = np.concatenate([self._time_s, np.zeros(more)])
        self._late = np.concatenate([self._late, np.zeros(more, np.int32)])

    def restarted(self) -> None:
        """Forget the ranks: they were ended to be started again, here or elsewhere."""
        self._host_of[:] = -1
        self._late[:] = 0
        self._summed = 0

    # ---- steps -------------------------------------------------------------------------------------------------------

    def sum_up(self, live: LiveRun, now_s: float) -> None:
        """Add the newest step that all ranks have done to the run's history, once."""
        there, columns = self._host_of >= 0, self._columns
        steps = columns["step"][there]
        if len(steps) < live.state.world_size() or (steps == UNKNOWN).any():
            return
        self._note_late(live.state.info.layout.pp)
        newest = int(steps.min())
        if newest <= self._summed:
            return
        self._summed = newest
        times = columns["step_s"]
        summary = pb.StepSummary(step=newest, time_s=now_s, step_s=_mean(times[there]))
        summary.slowest_rank = int(np.nanargmax(np.where(there, times, -1.0)))
        for name in _MEANS:
            value = _mean(columns[name][there])
            if not (math.isnan(value) and name in _OPTIONAL):
                setattr(summary, name, value)
        for name in ("tokens_per_s", "samples_per_s"):
            setattr(summary, name, float(np.nansum(columns[name][there])))
        live.say(pb.Record(all_ranks=summary))  # without a host's times, of which there are many
        worst = np.full(len(self._hosts), np.nan, np.float32)
        np.fmax.at(worst, self._host_of[there], times[there])
        newest_step = live.state.steps.history.last()
        assert newest_step is not None
        newest_step.rank_step_s.extend(worst.tolist())

    def own_work_s(self) -> Array:
        """Return how long each rank worked itself in its last steps, which waiting for others does not lengthen."""
        columns = self._columns
        return np.asarray(
            columns["data_wait_s"] + columns["forward_s"] + columns["backward_s"] + columns["optimizer_s"], np.float64
        )

    def _note_late(self, num_stages: int) -> None:
        """Count for how many roll-ups a rank's own work has taken longer than that of the ranks with the same part."""
        there, own = self._host_of >= 0, self.own_work_s()
        step_s = float(np.nanmedian(self._columns["step_s"][there]))
        stages = max(1, num_stages)
        stage = np.arange(len(own)) * stages // len(own)
        late = np.zeros(len(own), bool)
        for one in range(stages):
            mine = there & (stage == one)
            if mine.sum() > 2:
                late |= mine & (own - float(np.median(own[mine])) > LATE_SHARE * step_s)
        self._late = np.where(late, self._late + 1, 0).astype(np.int32)

    # ---- what watchers get -------------------------------------------------------------------------------------------

    def together(self, state: RunState, now_s: float) -> Together:
        """Return all that verdicts go by."""
        hosts = self._hosts
        gone = [number for number, host in enumerate(hosts) if now_s - host.heard_s > SILENT_S]
        rows = {name: [] for name in (*ENTERED, *WAITING)}  # type: dict[str, list[Array]]
        since: list[Array] = []
        for host in hosts:
            for name, part in (*host.entered.items(), *host.waiting.items()):
                rows[name].append(part)
            if host.waiting:
                since.append(host.time_s - host.waiting["waiting_age_s"].astype(np.float64))
        joined = {name: np.concatenate(parts) if parts else np.zeros(0, ALL[name]) for name, parts in rows.items()}
        return Together(
            run_id=state.info.run_id,
            world_size=state.world_size(),
            there=self._host_of >= 0,
            state=self._columns["state"],
            step=self._columns["step"],
            phase=self._columns["phase"],
            host_of=self._host_of,
            hosts=[host.state.node for host in hosts],
            heard_ago_s=np.array([now_s - host.heard_s for host in hosts]),
            gone=frozenset(gone),
            names=self._names,
            entered=joined,
            waiting_since_s=np.concatenate(since) if since else np.zeros(0),
            own_s=self.own_work_s(),
            step_s=self._columns["step_s"],
            late=self._late,
            p99_s=state.steps.p99_s(),
            now_s=now_s,
        )

    def snapshot(self, state: RunState, now_s: float) -> pb.Snapshot:
        """Return the run as watchers see it: the sickest rank of each host, the sickest host first in `hosts`."""
        found = pb.Snapshot(run=state.info, dropped=state.dropped)
        told_of: set[tuple[str, tuple[int, ...], str]] = set()
        for host in self._hosts:
            for one in host.diagnosis:
                if (key := (one.kind, tuple(one.ranks), one.group)) not in told_of and len(told_of) < MAX_LOCAL:
                    told_of.add(key)
                    found.diagnosis.append(one)
        blamed = np.zeros(len(self._host_of), bool)
        if not state.final:
            across = diagnose(self.together(state, now_s))
            for told in across:
                make_harmless(told)
            local = list(found.diagnosis)
            del found.diagnosis[:]
            found.diagnosis.extend([*local, *across])
            found.run.state, message = self._run_state(state, found, now_s)
            found.run.message = found.run.message or message
        for told in found.diagnosis:
            blamed[[rank for rank in told.ranks if rank < len(blamed)]] = True
        found.nodes.extend(host.state for host in self._hosts)
        self._add_ranks(found, self._scores(blamed, now_s), state, now_s)
        self._progress(found)
        ended_s = found.run.finished_s if found.run.HasField("finished_s") else now_s
        if (effort := state.effort.told(found.run.started_s, ended_s, was_cut=was_cut(found.run))) is not None:
            found.effort.CopyFrom(effort)
        return found

    def _run_state(self, state: RunState, found: pb.Snapshot, now_s: float) -> tuple[str, str]:
        there = self._host_of >= 0
        states = self._columns["state"][there]
        over = np.isin(states, (STATES.index(DEAD), STATES.index(FINISHED)))
        silent = all(now_s - host.heard_s > SILENT_S for host in self._hosts)
        if not launcher_alive(state, now_s) and len(states) and (over.all() or silent):
            done = (states == STATES.index(FINISHED)).all() and len(states) >= state.world_size()
            return ("finished", "") if done else ("failed", "all of its processes are gone, or silent")
        if any(one.kind in STALLED for one in found.diagnosis):
            return "stalled", ""
        return "running" if (self._columns["step"][there] != UNKNOWN).any() or len(states) else "starting", ""

    def _scores(self, blamed: Array, now_s: float) -> Array:
        """Return how sick each rank is; `SICK` and more is sick. Who only waits for others is not."""
        columns, own = self._columns, self.own_work_s()
        there = self._host_of >= 0
        usual = float(np.median(own[there])) if there.any() else 0.0
        score = np.clip(own / usual, 0.0, SICK / 2) if usual > 0 else np.zeros(len(own))
        score = score + np.where(columns["state"] == STATES.index(DEAD), 4 * SICK, 0.0)
        score += np.where(columns["state"] == STATES.index(STOPPED), 3 * SICK, 0.0)
        silent = np.array([now_s - host.heard_s > SILENT_S for host in self._hosts] or [False])
        score += np.where(there & silent[self._host_of], 4 * SICK, 0.0)
        return np.asarray(np.where(blamed, score + 5 * SICK, score))

    def _add_ranks(self, found: pb.Snapshot, score: Array, state: RunState, now_s: float) -> None:
        ranks = np.flatnonzero(self._host_of >= 0)
        if not len(ranks):
            return
        order = ranks[np.lexsort((-score[ranks], self._host_of[ranks]))]
        of_host = self._host_of[order]
        hosts, firsts, counts = np.unique(of_host, return_index=True, return_counts=True)
        sickest = order[firsts]
        lowest = np.minimum.reduceat(order, firsts)
        waits = self._waits()
        sick = score[sickest] >= SICK
        for at in np.lexsort((lowest, np.where(sick, -score[sickest], 0.0))):
            host = self._hosts[hosts[at]]
            found.hosts.add(
                node=host.state.node,
                row=int(hosts[at]),
                num_ranks=int(counts[at]),
                first_rank=int(lowest[at]),
                sick=bool(sick[at]),
            )
        shown = np.sort(sickest)
        columns = [column[shown].tolist() for column in self._columns.values()]
        for row in zip(*columns, strict=True):
            cells = dict(zip(self._columns, row, strict=True))
            found.ranks.append(self._rank(cells, waits.get(cells["rank"]), state, now_s))

    def _waits(self) -> dict[int, tuple[str, float]]:
        """Return of each rank that waits in what, and since when."""
        found = {}
        for host in self._hosts:
            if not host.waiting:
                continue
            for rank, group, op, seq, age_s in zip(*(part.tolist() for part in host.waiting.values()), strict=True):
                words = f"{self._names.get(op, '?')} {self._names.get(group, '?')}#{seq}"
                found[rank] = (words, host.time_s - age_s)
        return found

    def _rank(self, row: dict[str, Any], wait: tuple[str, float] | None, state: RunState, now_s: float) -> pb.RankState:
        rank = row["rank"]
        host, time_s = self._hosts[self._host_of[rank]], float(self._time_s[rank])
        found = pb.RankState(rank=rank, node=host.state.node, pid=row["pid"], state=STATES[row["state"]])
        if state.info.state in FINAL_STATES and found.state not in (DEAD, FINISHED):
            found.state = {"finished": FINISHED, "stopped": STOPPED}.get(state.info.state, DEAD)
        elif now_s - host.heard_s > SILENT_S and found.state != FINISHED:
            found.state = DEAD
        elif wait is not None and now_s - wait[1] > WAITING_S and found.state not in (DEAD, FINISHED, STOPPED):
            found.state = "waiting"
        if row["step"] != UNKNOWN:
            found.step = found.last_step.step = row["step"]
            found.last_step.total_steps = row["total_steps"]
            for name in ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s"):
                setattr(found.last_step, name, row[name])
        for name in ("loss", "step_s", "tokens_per_s", "samples_per_s"):
            if not math.isnan(row[name]):
                setattr(found, name, row[name])
                if name in ("loss", "step_s"):
                    setattr(found.last_step, name, row[name])
        if row["memory_bytes"] != UNKNOWN:
            found.memory_bytes = row["memory_bytes"]
            if row["device_bytes"] != UNKNOWN:
                found.memory.device_total_bytes = row["device_bytes"]
        beat = found.heartbeat
        beat.phase = PHASES[row["phase"]] if row["phase"] < len(PHASES) else ""
        if not math.isnan(row["phase_age_s"]):
            beat.phase_since_s = time_s - row["phase_age_s"]
        if wait is not None:
            beat.waiting_in, beat.waiting_since_s = wait
        if not math.isnan(row["seen_age_s"]):
            found.last_seen_s = time_s - row["seen_age_s"]
        known = state.ranks.get(rank)
        if known is not None and known.started is not None:
            found.device, found.device_name = known.started.device, known.started.device_name
            found.num_parameters = known.started.num_parameters
        if known is not None and known.finished is not None:
            found.error = known.finished.error
        return found

    def _progress(self, found: pb.Snapshot) -> None:
        there = self._host_of >= 0
        steps = self._columns["step"][there]
        if len(steps) < max(1, found.run.world_size) or (steps == UNKNOWN).any():
            return
        found.step = int(steps.min())
        if total := int(self._columns["total_steps"][there].max()):
            found.total_steps = total
            pace_s = float(np.nanmax(self._columns["step_s"][there]))
            if found.run.state in ("running", "starting") and math.isfinite(pace_s):
                found.left_s = max(0, total - found.step) * pace_s


_DTYPES = {name: np.dtype(code).newbyteorder("<") for name, code in ALL.items()}


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
