"""A job that is rolled up: columns, what the head says of all ranks together, and which host is the sick one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.observe import DEAD, FINISHED, RUNNING, STOPPED, Observed, Wait
from distui.daemon.runs.batches import Malformed
from distui.daemon.runs.state import RankRecord, RunState
from distui.daemon.tree.columns import join, roll_up
from distui.daemon.tree.many import Many
from distui.daemon.tree.relay import Clocks
from distui.proto import rollup_pb2 as up
from distui.proto import telemetry_pb2 as pb

NODES, RANKS = 6, 4
WORLD = NODES * RANKS
NOW_S = 1_000_000.0


class Job:
    """Ranks as their nodes' daemons know them, all well, and the head that hears of them."""

    def __init__(self, folder: Path) -> None:
        run = RunFolder(folder / "train-1")
        run.create()
        spec = {"run_id": "train-1", "world_size": WORLD, "num_nodes": NODES, "started_s": NOW_S - 100}
        run.spec.write_text(json.dumps(spec))
        self.state, self.many = RunState(run), Many()
        self.ranks: dict[int, tuple[RankRecord, Observed]] = {}
        for rank in range(WORLD):
            record = RankRecord(rank, f"gpu{rank // RANKS}", 100 + rank, 1, last_seen_s=NOW_S)
            record.last_step = pb.Step(step=30, step_s=0.5, exposed_comm_s=0.2)
            record.loss = 1.5
            record.recent.append((0.5, 100, 10))
            record.last_parts.append((30, (0.0, 0.1, 0.2, 0.0)))
            seen = Observed(rank, record.node, record.pid, RUNNING, 30, "backward", NOW_S - 0.1)
            seen.last_seq = {"data_parallel": 60}
            self.ranks[rank] = record, seen

    def wait(
        self, rank: int, seq: int = 61, op: str = "all_reduce", since_s: float = 20.0, group: str = "data_parallel"
    ) -> None:
        """Have a rank wait in a collective."""
        record, seen = self.ranks[rank]
        seen.last_seq[group] = seq
        self.ranks[rank] = record, replace(seen, wait=Wait(group, seq, op, NOW_S - since_s))

    def own(self, rank: int, seconds: float) -> None:
        """Have a rank work so long in a step."""
        self.ranks[rank][0].last_parts.clear()
        self.ranks[rank][0].last_parts.append((30, (0.0, seconds, 0.0, 0.0)))

    def node(self, number: int, now_s: float = NOW_S) -> tuple[up.RolledNode, up.RankColumns, dict[int, str]]:
        """Return what a node's daemon rolls up."""
        mine = [self.ranks[rank] for rank in range(number * RANKS, (number + 1) * RANKS)]
        node, columns, names = roll_up(mine, now_s)
        node.node, node.time_s = f"gpu{number}", now_s
        return node, columns, names

    def hear(self, nodes: range = range(NODES), now_s: float = NOW_S) -> None:
        """Have the head hear of nodes, in one message, as from a relay."""
        parts = [self.node(number, now_s) for number in nodes]
        names = {key: name for _, _, some in parts for key, name in some.items()}
        columns = join([columns for _, columns, _ in parts])
        roll = up.RollUp(run_id="train-1", nodes=[node for node, _, _ in parts], ranks=columns, names=names)
        self.many.take(roll, now_s)

    def snapshot(self, now_s: float = NOW_S) -> pb.Snapshot:
        """Return what watchers get."""
        return self.many.snapshot(self.state, now_s)

    def verdict(self) -> pb.Diagnosis:
        """Return the one thing that is wrong."""
        self.hear()
        (found,) = self.snapshot().diagnosis
        return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_that_is_well_has_one_rank_a_host_and_nothing_wrong(job: Job) -> None:
    job.hear()
    found = job.snapshot()
    assert not found.diagnosis
    assert [host.node for host in found.hosts] == [f"gpu{number}" for number in range(NODES)]
    assert not any(host.sick for host in found.hosts)
    assert [rank.node for rank in found.ranks] == [f"gpu{number}" for number in range(NODES)]
    assert {(rank.step, round(rank.loss, 3), round(rank.step_s, 3)) for rank in found.ranks} == {(30, 1.5, 0.5)}
    assert (found.step, found.run.state) == (30, "running")


def test_who_has_not_entered_is_named_and_its_host_is_first(job: Job) -> None:
    for rank in range(WORLD):
        if rank != 14:
            job.wait(rank)
    found = job.verdict()
    assert (found.kind, list(found.ranks), found.group, found.seq) == ("hang", [14], "data_parallel", 61)
    assert "rank 14 on gpu3 has not entered all_reduce #61 of data_parallel for 20 s" in found.message
    snapshot = job.snapshot()
    assert snapshot.hosts[0].node == "gpu3" and snapshot.hosts[0].sick
    assert [rank.rank for rank in snapshot.ranks if rank.node == "gpu3"] == [14]
    assert snapshot.run.state == "stalled"


def test_the_chain_of_waits_is_followed_to_its_end(job: Job) -> None:
    # Rank 5 waits for rank 4 in a small group; all others wait for both in the large one.
    for rank in range(WORLD):
        if rank not in (4, 5):
            job.wait(rank)
        job.ranks[rank][1].last_seq[f"tp[{rank // 2 * 2},{rank // 2 * 2 + 1}]"] = 8
    job.wait(5, seq=9, group="tp[4,5]")
    found = job.verdict()
    assert list(found.ranks) == [4]


def test_ranks_that_wait_for_each_other_are_a_circle(job: Job) -> None:
    job.wait(0, seq=9, group="tp[0,1]")
    job.wait(1, seq=9, group="dp[0,1]")
    for rank in (0, 1):
        for group in ("tp[0,1]", "dp[0,1]"):
            job.ranks[rank][1].last_seq.setdefault(group, 8)
    found = job.verdict()
    assert found.kind == "hang" and "in a circle" in found.message and list(found.ranks) == [0, 1]


def test_ranks_in_different_operations_disagree(job: Job) -> None:
    for rank in range(WORLD):
        job.wait(rank, op="broadcast" if rank == 9 else "all_reduce", since_s=3.0)
    found = job.verdict()
    assert (found.kind, list(found.ranks)) == ("mismatch", [9])
    assert "1 rank from rank 9 on: broadcast" in found.message


def test_all_in_and_no_end_is_the_network(job: Job) -> None:
    for rank in range(WORLD):
        job.wait(rank)
    assert "all ranks have entered all_reduce #61" in job.verdict().message


def test_nothing_is_said_of_all_ranks_while_some_are_not_seen(job: Job) -> None:
    for rank in range(WORLD):
        job.wait(rank)
    job.hear(range(NODES - 1))
    assert not job.snapshot().diagnosis


def test_who_has_ended_while_others_wait_left_early(job: Job) -> None:
    for rank in range(WORLD):
        job.wait(rank)
    record, seen = job.ranks[3]
    job.ranks[3] = record, replace(seen, process=FINISHED, wait=None, last_seq={"data_parallel": 60})
    assert job.verdict().kind == "left_early"


def test_a_stopped_rank_is_told(job: Job) -> None:
    for rank in range(1, WORLD):
        job.wait(rank)
    record, seen = job.ranks[0]
    job.ranks[0] = record, replace(seen, process=STOPPED)
    assert "stopped by a signal" in job.verdict().message


def test_a_silent_host_is_told_and_nothing_of_its_ranks(job: Job) -> None:
    for rank in range(WORLD - RANKS):
        job.wait(rank)
    job.hear()
    job.hear(range(NODES - 1), NOW_S + 30)
    found = job.snapshot(NOW_S + 30)
    assert [(one.kind, list(one.ranks)) for one in found.diagnosis] == [("silent_host", [20, 21, 22, 23])]
    assert found.hosts[0].node == "gpu5"
    assert next(rank for rank in found.ranks if rank.node == "gpu5").state == DEAD


def test_who_works_longer_than_the_others_is_a_straggler(job: Job, live: _Live) -> None:
    job.own(7, 0.45)
    live.state.many = job.many
    for second in range(6):
        job.hear(now_s=NOW_S + second)
        job.many.sum_up(live, NOW_S + second)  # type: ignore[arg-type]
    (found,) = job.snapshot(NOW_S + 5).diagnosis
    assert (found.kind, list(found.ranks)) == ("straggler", [7])
    assert job.snapshot(NOW_S + 5).hosts[0].node == "gpu1"


class _Live:
    def __init__(self, state: RunState) -> None:
        self.state = state

    def say(self, record: pb.Record) -> None:
        record.time_s = time.time()
        self.state.apply(pb.Batch(source=pb.Source(rank=-2, incarnation=1), records=[record]))


@pytest.fixture
def live(job: Job) -> _Live:
    return _Live(job.state)


def test_steps_are_summed_up_by_host(job: Job, live: _Live) -> None:
    job.ranks[9][0].recent.append((0.7, 100, 10))
    job.hear()
    job.many.sum_up(live, NOW_S)  # type: ignore[arg-type]
    job.many.sum_up(live, NOW_S)  # type: ignore[arg-type]
    (summary,) = job.state.steps.history.all()
    assert (summary.step, summary.slowest_rank, round(summary.loss, 3)) == (30, 9, 1.5)
    assert [round(value, 2) for value in summary.rank_step_s] == [0.5, 0.5, 0.6, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("wrong", ["counts", "ranks", "state"])
def test_columns_that_cannot_be_are_refused(job: Job, wrong: str) -> None:
    node, columns, names = job.node(0)
    if wrong == "counts":
        node.num_ranks = 9
    elif wrong == "ranks":
        columns.rank = b"\xff" * 16
    else:
        columns.state = b"\x09" * 4
    with pytest.raises(Malformed):
        job.many.take(up.RollUp(run_id="train-1", nodes=[node], ranks=columns, names=names), NOW_S)
    assert not job.snapshot().ranks


def test_the_fastest_round_trip_says_how_clocks_differ() -> None:
    clocks = Clocks()
    assert clocks.ahead_s == 0.0
    clocks.note(100.0, 107.0, 104.0)
    clocks.note(200.0, 205.05, 200.1)
    clocks.note(300.0, 309.0, 308.0)
    assert clocks.ahead_s == pytest.approx(5.0)
