"""What is known of one rank, from its records and from the node's own processes."""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass, field

from distui.daemon import process
from distui.proto import telemetry_pb2 as pb

HOST = socket.gethostname()
WAITING_AFTER_S = 1.0
SILENT_AFTER_S = 15.0
"""A rank of another node that has not been heard for so long is taken for dead."""
_UNSEEN_GRACE_S = 3.0
_MEAN_STEPS = 20
_P99_STEPS = 200


@dataclass(slots=True)
class RankView:
    """One rank, in its newest incarnation."""

    rank: int
    node: str = ""
    pid: int = 0
    incarnation: int = 0
    last_seen_s: float = 0.0
    heard_s: float = 0.0
    """By this daemon's clock; 0 while it only knows the rank from disk."""
    started: pb.RankStarted = field(default_factory=pb.RankStarted)
    finished: pb.RankFinished | None = None
    last_step: pb.Step | None = None
    memory: pb.Memory | None = None
    heartbeat: pb.Heartbeat | None = None
    heartbeat_s: float = 0.0
    progress_s: float = 0.0
    """When the main thread last did something that can be told: a step, a phase, a collective."""
    recent: deque[pb.Step] = field(default_factory=lambda: deque(maxlen=_P99_STEPS))
    alive: bool = True
    stopped: bool = False
    died_s: float | None = None
    start_ticks: int | None = None

    def apply(self, record: pb.Record) -> None:
        """Take one record of this incarnation."""
        self.last_seen_s = max(self.last_seen_s, record.time_s)
        kind = record.WhichOneof("body")
        if kind == "step":
            self.last_step = record.step
            self.recent.append(record.step)
            self.progress_s = max(self.progress_s, record.time_s)
        elif kind == "memory":
            self.memory = record.memory
        elif kind == "heartbeat":
            if self.heartbeat is None or _moved(self.heartbeat, record.heartbeat):
                self.progress_s = max(self.progress_s, record.time_s)
            self.heartbeat, self.heartbeat_s = record.heartbeat, record.time_s
        elif kind == "rank_started":
            self.started = record.rank_started
            self.progress_s = max(self.progress_s, record.time_s)
        elif kind == "rank_finished":
            self.finished = record.rank_finished

    def probe(self, now_s: float) -> None:
        """Look whether the process is there, and whether it is stopped (Ctrl-Z, SIGSTOP)."""
        if self.finished is not None:
            return
        if self.node and self.node != HOST:
            self.alive = now_s - max(self.last_seen_s, self.heard_s) < SILENT_AFTER_S
        else:
            sight = process.find(self.pid, self.incarnation / 1e9, self.start_ticks)
            if sight is not None:
                self.start_ticks, self.alive, self.stopped = sight.start_ticks, True, sight.state in "Tt"
                return
            self.stopped = False
            # Never seen: its pid may be of another namespace, so that only silence tells.
            unseen = self.start_ticks is None
            self.alive = unseen and now_s - max(self.last_seen_s, self.heard_s) < _UNSEEN_GRACE_S
        if not self.alive and self.died_s is None:
            self.died_s = now_s if self.start_ticks is not None else self.last_seen_s
        elif self.alive:
            self.died_s = None

    def step(self) -> int:
        """Return the last completed step; 0 before any."""
        told = self.heartbeat.step if self.heartbeat is not None else 0
        return max(told, self.last_step.step if self.last_step is not None else 0)

    def p99_step_s(self) -> float:
        """Return the 99th percentile of the recent steps' times; 0 before any."""
        times = sorted(step.step_s for step in self.recent)
        return times[int(0.99 * (len(times) - 1))] if times else 0.0

    def waiting_since_s(self, now_s: float) -> float | None:
        """Return since when the main thread has been blocked in a collective, if for over a second."""
        beat = self.heartbeat
        if beat is None or not beat.waiting_in or now_s - beat.waiting_since_s <= WAITING_AFTER_S:
            return None
        return beat.waiting_since_s if self.progress_s <= self.heartbeat_s else None

    def state(self, now_s: float, run_state: str) -> str:
        """Return running, waiting, stopped, dead or finished."""
        if self.finished is not None or run_state == "finished":
            return "finished"
        if run_state in ("failed", "stopped") or not self.alive:
            return "dead"
        if self.stopped:
            return "stopped"
        return "waiting" if self.waiting_since_s(now_s) is not None else "running"

    def message(self, state: str, error: str) -> pb.RankState:
        """Return what watchers see."""
        found = pb.RankState(
            rank=self.rank,
            node=self.node,
            pid=self.pid,
            state=state,
            device=self.started.device,
            device_name=self.started.device_name,
            num_parameters=self.started.num_parameters,
            error=(self.finished.error if self.finished is not None else "") or error,
            last_step=self.last_step,
            memory=self.memory,
            heartbeat=self.heartbeat,
        )
        if self.last_seen_s:
            found.last_seen_s = self.last_seen_s
        if self.last_step is not None or self.heartbeat is not None:
            found.step = self.step()
        if self.last_step is not None:
            if self.last_step.HasField("loss"):
                found.loss = self.last_step.loss
            mean = list(self.recent)[-_MEAN_STEPS:]
            total_s = sum(step.step_s for step in mean)
            found.step_s = total_s / len(mean)
            if total_s > 0:
                found.tokens_per_s = sum(step.tokens for step in mean) / total_s
        if self.memory is not None:
            cpu = self.started.device.startswith("cpu") or not self.started.device
            name = "rss_bytes" if cpu else "allocated_bytes"
            if self.memory.HasField(name):
                found.memory_bytes = getattr(self.memory, name)
        return found


def _moved(before: pb.Heartbeat, after: pb.Heartbeat) -> bool:
    return (
        before.step != after.step
        or before.phase_since_s != after.phase_since_s
        or before.waiting_in != after.waiting_in
        or before.waiting_since_s != after.waiting_since_s
        or before.last_seq != after.last_seq
    )
