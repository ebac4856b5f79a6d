"""Who is slow: from the collectives of all ranks, made up with the times that such a job has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.collectives import CollectiveTotals
from distui.daemon.diagnosis.observe import observe
from distui.daemon.diagnosis.pace import Pace, SlowLink
from distui.daemon.diagnosis.verdicts import diagnose
from distui.daemon.runs.state import RunState
from distui.proto import telemetry_pb2 as pb

BEGAN_S = 1000.0


class Job:
    """Steps with a collective each, in which some ranks come later than the others."""

    def __init__(self, world: int = 4) -> None:
        self.world, self.pace, self.now_s, self.seq = world, Pace(), BEGAN_S, 0

    def steps(
        self,
        count: int,
        step_s: float,
        late: Mapping[int, Callable[[int], float]] = {},
        num_bytes: int = 1 << 20,
        transfer_s: float = 0.002,
        op: Callable[[int], str] = lambda rank: "all_reduce",
        root: int | None = None,
    ) -> None:
        for _ in range(count):
            self.seq += 1
            # A rank is a little late by itself, each time another one.
            arrivals = {
                rank: self.now_s
                + step_s
                + 0.0005 * ((rank + self.seq) % 3)
                + late.get(rank, lambda step: 0.0)(self.seq)
                for rank in range(self.world)
            }
            self.now_s = max(arrivals.values()) + transfer_s
            told = {
                rank: pb.Collective(
                    group="world",
                    seq=self.seq,
                    op=op(rank),
                    bytes=num_bytes,
                    enqueued_s=arrival_s,
                    finished_s=self.now_s,
                    group_size=self.world,
                    is_root=rank == root,
                )
                for rank, arrival_s in arrivals.items()
            }
            self.pace.add(told)

    def late(self) -> tuple[int, ...]:
        found = self.pace.straggler(self.now_s)
        return found.ranks if found is not None else ()


def always(seconds: float) -> Callable[[int], float]:
    return lambda step: seconds


def test_both_ranks_of_a_slow_host_are_named() -> None:
    job = Job()
    job.steps(200, 0.1, {2: always(0.03), 3: always(0.031)})
    assert job.late() == (2, 3)


@pytest.mark.parametrize("step_s", [0.1, 2.0, 5.0])
def test_a_rank_half_as_slow_again_is_named_whatever_a_step_takes(step_s: float) -> None:
    job = Job(3)
    job.steps(20 if step_s > 1 else 100, step_s, {1: always(step_s / 2)})
    assert job.late() == (1,)
    job.steps(200 if step_s < 1 else 40, step_s)
    assert job.late() == ()


def test_a_rank_that_is_slow_every_tenth_step_is_named() -> None:
    job = Job(3)
    job.steps(60, 0.5, {1: lambda step: 1.0 * (step % 10 == 0)})
    assert job.late() == (1,)


def test_ranks_that_are_late_in_turns_or_once_are_no_stragglers() -> None:
    turns = Job(3)
    turns.steps(200, 0.1, {rank: lambda step, rank=rank: 0.05 * (step % 3 == rank) for rank in range(3)})  # type: ignore[misc]
    once = Job(3)
    once.steps(200, 0.1, {0: lambda step: 6.0 * (step == 150)})
    assert turns.late() == once.late() == ()


def test_who_receives_waits_by_design() -> None:
    job = Job(2)
    job.steps(100, 0.1, {1: always(0.08)}, op=lambda rank: ("recv", "send")[rank])
    assert job.late() == ()


def rolled_out(job: Job, learner_s: float, actor_s: Mapping[int, float], by: str = "gather") -> None:
    """Go through a cycle of reinforcement learning: actors roll out, rank 0 trains, and gives its weights away."""
    late = {rank: always(seconds) for rank, seconds in actor_s.items()}
    job.steps(1, 0.001, late, op=lambda rank: by, root=0 if by == "gather" else None, num_bytes=1 << 12)
    job.steps(1, 0.001, {0: always(learner_s)}, op=lambda rank: "broadcast", root=0)


@pytest.mark.parametrize("actor_s", [0.0, 0.05, 0.3])
def test_a_learner_that_actors_wait_for_is_no_straggler(actor_s: float) -> None:
    job = Job()
    for _ in range(200):
        rolled_out(job, 0.3, {1: actor_s, 2: actor_s, 3: 1.01 * actor_s})
    assert job.late() == ()


def test_an_actor_that_a_learner_waits_for_is_no_straggler() -> None:
    job = Job(2)
    for _ in range(100):
        rolled_out(job, 0.05, {1: 0.5}, by="all_gather")
    assert job.late() == ()


def test_an_actor_that_is_slow_among_actors_is_named() -> None:
    job = Job()
    for _ in range(100):
        rolled_out(job, 0.1, {1: 0.1, 2: 0.3, 3: 0.1})
    assert job.late() == (2,)


def test_ranks_that_take_turns_between_barriers_are_no_stragglers() -> None:
    job = Job(3)
    for _ in range(100):
        job.steps(1, 0.001, {0: always(0.3)}, op=lambda rank: "barrier", num_bytes=1)
        job.steps(1, 0.001, {1: always(0.05), 2: always(0.05)}, op=lambda rank: "barrier", num_bytes=1)
    assert job.late() == ()


def test_rank_0_that_gives_its_buffers_away_is_named_where_all_train_alike() -> None:
    job = Job(3)
    for _ in range(100):
        job.steps(1, 0.001, {0: always(0.05)}, op=lambda rank: "broadcast", root=0, num_bytes=256)
        job.steps(1, 0.1)
    assert job.late() == (0,)


def test_who_waits_in_another_group_is_not_blamed_for_it() -> None:
    """Rank 1 is slow; rank 0 shares its layers with it, and so is late among those that hold the same part."""
    totals = CollectiveTotals()
    now_s = BEGAN_S
    for step in range(1, 101):
        now_s += 0.1
        for pair in ((0, 1), (2, 3)):
            late_s = 0.05 * (1 in pair)
            for rank in pair:
                waited_s = late_s if rank == 0 else 0.0
                told(totals, f"tp[{pair[0]},{pair[1]}]", step, rank, now_s + late_s - waited_s, waited_s)
        for pair in ((0, 2), (1, 3)):
            for rank in pair:
                arrived_s = now_s + 0.001 + 0.05 * (rank < 2)
                told(totals, f"dp[{pair[0]},{pair[1]}]", step, rank, arrived_s, now_s + 0.051 - arrived_s)
        now_s += 0.052
    found = totals.pace.straggler(now_s)
    assert found is not None and found.ranks == (1,)
    windows = totals.pace._windows["dp[0,2]"]
    assert (
        sum(window.lost_s.get(0, 0.0) for window in windows)
        < 0.1
        < sum(window.lost_s.get(1, 0.0) for window in totals.pace._windows["dp[1,3]"])
    )


def told(totals: CollectiveTotals, group: str, seq: int, rank: int, arrived_s: float, waited_s: float) -> None:
    """Have a rank tell of an all-reduce in a group of two."""
    one = pb.Collective(group=group, seq=seq, op="all_reduce", bytes=64, group_size=2, enqueued_s=arrived_s)
    one.finished_s, one.blocked_s = arrived_s + waited_s, waited_s
    totals.add(rank, one, 4)


def slow(job: Job) -> SlowLink | None:
    return job.pace.slow_link(job.now_s)


def test_a_slow_link_is_seen_in_large_messages_only() -> None:
    for num_bytes in (8, 1 << 20):
        job = Job()
        job.steps(100, 0.05, num_bytes=num_bytes)
        assert slow(job) is None
        job.steps(60, 0.05, num_bytes=num_bytes, transfer_s=0.2)
        assert (slow(job) is not None) == (num_bytes > 8)


def test_a_link_that_is_slow_only_at_times_is_not_the_one_to_blame() -> None:
    """A busy processor makes most transfers long, and leaves some as they were."""
    job = Job()
    job.steps(100, 0.05)
    for _ in range(30):
        job.steps(5, 0.05, transfer_s=0.03)
        job.steps(1, 0.05)
        assert slow(job) is None


def test_a_slow_link_that_flutters_stays_one_until_it_is_calm() -> None:
    job = Job()
    job.steps(100, 0.05)
    job.steps(60, 0.05, transfer_s=0.02)
    for transfer_s in (0.007, 0.02) * 6:  # below and above what begins an episode
        job.steps(10, 0.05, transfer_s=transfer_s)
        assert slow(job) is not None
    job.steps(100, 0.05)
    assert slow(job) is None


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    run = RunFolder(tmp_path / "train-1")
    run.create()
    return RunState(run)


def feed(state: RunState, job: Job, parts: Mapping[int, Callable[[int], Any]]) -> None:
    """Give the state a job's pace, and the last steps of its ranks with their parts."""
    for rank in range(job.world):
        records = [
            pb.Record(seq=step, time_s=job.now_s, step=pb.Step(step=step, step_s=0.5, **parts[rank](step)))
            for step in range(1, 21)
        ]
        source = pb.Source(rank=rank, node="node", pid=1, incarnation=1)
        state.apply(pb.Batch(source=source, records=records))
    state.collectives.pace = job.pace


def test_the_phase_is_that_of_its_slow_steps(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of ten reads a file for a second; in all others its backward is a little longer than the others'."""
    job = Job(3)
    job.steps(60, 0.5, {1: lambda step: 1.0 * (step % 10 == 0)})
    usual = {"forward_s": 0.2, "backward_s": 0.2}

    def slow_rank(step: int) -> dict[str, float]:
        return {"forward_s": 0.2, "backward_s": 0.32, "data_wait_s": 1.0 * (step % 10 == 0)}

    feed(state, job, {0: lambda step: usual, 1: slow_rank, 2: lambda step: usual})
    monkeypatch.setattr("time.time", lambda: job.now_s)
    (found,) = diagnose(state, observe(state, job.now_s), job.now_s)
    assert (found.kind, list(found.ranks)) == ("straggler", [1])
    assert "its data takes 1000 ms longer" in found.message


def test_a_phase_that_does_not_explain_it_is_not_named(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it late is between its steps: a file that it alone writes, a sleep."""
    job = Job(3)
    job.steps(60, 0.5, {1: always(0.3)})
    feed(
        state,
        job,
        {
            rank: lambda step, rank=rank: {"forward_s": 0.2, "optimizer_s": 0.0005 + 0.02 * (rank == 1)}  # type: ignore[misc]
            for rank in range(3)
        },
    )
    monkeypatch.setattr("time.time", lambda: job.now_s)
    (found,) = diagnose(state, observe(state, job.now_s), job.now_s)
    assert (
        found.kind == "straggler" and "optimizer" not in found.message and "stacks shows what it does" in found.message
    )


def steps_of(state: RunState, job: Job, *ranks: int) -> None:
    """Have these ranks tell of 20 steps, the last of them just now."""
    for rank in range(job.world):
        records = [pb.Record(seq=1, time_s=job.now_s - 60, step=pb.Step(step=1, step_s=0.5))]
        if rank in ranks:
            records.append(pb.Record(seq=2, time_s=job.now_s, step=pb.Step(step=2, step_s=0.5)))
        records.append(pb.Record(seq=3, time_s=job.now_s, heartbeat=pb.Heartbeat(step=2)))
        state.apply(pb.Batch(source=pb.Source(rank=rank, node="node", pid=1, incarnation=1), records=records))
    state.collectives.pace = job.pace


@pytest.mark.parametrize("ranks", [(1,), (0, 2), (0, 1, 2), ()])
def test_who_alone_makes_steps_has_another_part(
    state: RunState, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]
) -> None:
    """A learner that trains on what was rolled out before never waits, and so is late like a slow rank."""
    job = Job(3)
    job.steps(60, 0.5, {1: always(0.3)})
    steps_of(state, job, *ranks)
    monkeypatch.setattr("time.time", lambda: job.now_s)
    told = [found.kind for found in diagnose(state, observe(state, job.now_s), job.now_s)]
    assert told == (["straggler"] if len(ranks) in (0, 3) else [])


def test_who_evaluates_is_no_straggler(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(3)
    steps_of(state, job, 0, 1, 2)
    monkeypatch.setattr("time.time", lambda: job.now_s)
    for _ in range(60):
        began_s = job.now_s
        job.now_s += 0.8  # it is looked at each second, while it evaluates
        beat = pb.Heartbeat(step=2, phase="evaluation", phase_since_s=began_s)
        state.ranks[0].heartbeat = beat
        assert diagnose(state, observe(state, job.now_s), job.now_s) == []
        state.ranks[0].heartbeat = None
        for record in state.ranks.values():
            record.last_seen_s = job.now_s
        job.now_s = began_s
        job.steps(1, 0.1, {0: always(1.0)})
        job.steps(3, 0.1)
    assert diagnose(state, observe(state, job.now_s), job.now_s) == []


@pytest.mark.parametrize(("nice", "told"), [(0.0, []), (60.0, ["slow_link"])])
def test_processors_with_nothing_left_say_nothing_of_a_link(
    state: RunState, monkeypatch: pytest.MonkeyPatch, nice: float, told: list[str]
) -> None:
    job = Job(2)
    job.steps(100, 0.05)
    job.steps(60, 0.05, transfer_s=0.2)
    feed(state, job, dict.fromkeys(range(2), lambda step: {}))
    sample = pb.HardwareSample(cpu_percent=99.0, cpu_nice_percent=nice)
    daemon = pb.Source(rank=-2, node="node", pid=1, incarnation=1)
    state.apply(pb.Batch(source=daemon, records=[pb.Record(seq=1, time_s=job.now_s, hardware=sample)]))
    monkeypatch.setattr("time.time", lambda: job.now_s)
    assert [found.kind for found in diagnose(state, observe(state, job.now_s), job.now_s)] == told


def test_who_waited_for_a_person_is_no_straggler() -> None:
    """A person who goes on from breakpoint to breakpoint makes a rank late in every step."""
    late, excused = Job(2), Job(2)
    for job in (late, excused):
        for _ in range(30):
            began_s = job.now_s
            if job is excused:
                job.pace.excuse(1, began_s + 0.1, began_s + 3.05)
            job.steps(1, 0.1, {1: always(3.0)})
    assert late.late() == (1,) and excused.late() == ()
