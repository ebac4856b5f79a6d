"""Each fault, provoked for real with three gloo ranks: what the daemon says of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from typing import TYPE_CHECKING

import pytest

from distui.core.paths import daemon_socket
from distui.core.telemetry.ledger import LedgerReader
from distui.daemon.diagnosis.deaths import oom_killed
from distui.daemon.diagnosis.observe import this_node
from distui.daemon.diagnosis.verdicts import CPU_FULL_S
from distui.daemon.runs.snapshot import snapshot_json
from distui.daemon.runs.state import CPU_FULL
from distui.daemon.runs.store import read_batches
from distui.launcher.job.daemon_client import execute
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.faults.conftest import Jobs


def check_stacks(jobs: Jobs, fault: str, words: str) -> None:
    """Stacks come also from a rank that cannot answer."""
    replies = list(execute(daemon_socket(), jobs.run(fault).run_id, "stacks", {}, 10.0))
    (culprit,) = [reply for reply in replies if reply.rank == 1 and reply.state != "accepted"]
    assert culprit.state == "done" and words in culprit.message
    assert b"faulty_ranks.py" in culprit.payload
    assert {reply.rank for reply in replies if reply.state == "done"} == {0, 1, 2}


def test_every_collective_is_in_the_ledger_with_its_group(jobs: Jobs) -> None:
    run = jobs.wait_fault("order")
    with LedgerReader.open(run.rank_ledger(0)) as reader:
        entries = list(reader.entries())
    reduces = [entry for entry in entries if entry.op == "all_reduce" and entry.group == "world"]
    assert [entry.seq for entry in reduces] == sorted({entry.seq for entry in reduces})
    assert {(entry.dtype, entry.num_bytes, entry.group_size) for entry in reduces} == {("float32", 4096, 3)}
    assert all(entry.finished_s is None or entry.finished_s >= entry.enqueued_s for entry in reduces)


def test_another_order_of_collectives_is_a_circle(jobs: Jobs) -> None:
    found, _ = jobs.verdict("order")
    assert found.kind == "hang" and set(found.ranks) == {0, 1, 2}
    assert "in a circle" in found.message and found.message.count("in order") == 3


def test_a_killed_rank(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("killed")
    assert (found.kind, list(found.ranks)) == ("dead_rank", [1])
    assert "last seen at" in found.message and "job.py" in found.message
    assert snapshot.run.state in ("stalled", "failed")


def test_a_rank_that_runs_out_of_memory(jobs: Jobs) -> None:
    found, _ = jobs.verdict("memory_error")
    assert (found.kind, list(found.ranks)) == ("out_of_memory", [1])
    assert "can't allocate memory" in found.message and "GiB" in found.message and "micro batch" in found.message


def test_a_rank_that_the_kernel_kills_for_memory(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("memory_killed")
    assert list(found.ranks) == [1]
    if os.access("/dev/kmsg", os.R_OK):
        assert found.kind == "out_of_memory" and "by the kernel" in found.message
        assert not oom_killed(os.getpid(), this_node())
    assert not oom_killed(snapshot.ranks[1].pid, "another-node")


def test_a_rank_asleep_is_named_with_its_stack(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("asleep")
    assert (found.kind, list(found.ranks)) == ("hang", [1])
    assert (found.collective, found.group) == ("all_reduce", "world") and found.seq > 60
    assert re.search(r"now at hangs.py:\d+ in asleep", found.message) and "ranks 0, 2 wait there" in found.message
    shown = snapshot_json(snapshot)["diagnosis"][0]
    assert set(shown) == {"kind", "ranks", "collective", "group", "seq", "since_s", "message"}
    assert json.dumps(shown) and shown["since_s"] > 0
    assert [rank.state for rank in snapshot.ranks] == ["waiting", "running", "waiting"]


def test_a_stopped_rank(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("stopped")
    assert (found.kind, list(found.ranks)) == ("hang", [1])
    assert f"kill -CONT {snapshot.ranks[1].pid}" in found.message and "last seen at" in found.message
    check_stacks(jobs, "stopped", "was ")


def test_a_rank_that_holds_the_gil_shows_its_stack(jobs: Jobs) -> None:
    found, _ = jobs.verdict("holding_the_gil")
    assert (found.kind, list(found.ranks)) == ("hang", [1])
    assert "GIL" in found.message and "in holding_the_gil" in found.message
    check_stacks(jobs, "holding_the_gil", "GIL")


def test_different_operations(jobs: Jobs) -> None:
    found, _ = jobs.verdict("operation")
    assert (found.kind, list(found.ranks)) == ("mismatch", [1])
    assert "rank 1: broadcast" in found.message and "ranks 0, 2: all_reduce" in found.message
    assert re.search(r"rank 1 is at hangs.py:\d+ in operation", found.message)


def test_different_sizes(jobs: Jobs) -> None:
    found, _ = jobs.verdict("size")
    assert (found.kind, list(found.ranks)) == ("mismatch", [1])
    assert "16,384 bytes" in found.message and "ranks 0, 2: all_reduce of 4,096 bytes" in found.message


def test_a_straggler_is_named_with_its_phase(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("straggler", "its forward takes")
    assert (found.kind, list(found.ranks)) == ("straggler", [1])
    assert snapshot.run.state == "running"


def test_a_learner_is_no_straggler_and_a_slow_actor_is(jobs: Jobs) -> None:
    found, _ = jobs.verdict("slow_actor")
    assert (found.kind, list(found.ranks)) == ("straggler", [2])
    run = jobs.wait_fault("learner_that_actors_wait_for")
    while True:  # for as many cycles as the slow actor's verdict took, twice over
        snapshot = jobs.bench.snapshot(run)
        assert not snapshot.diagnosis, snapshot.diagnosis[0].message
        if any(one.op == "gather" and min(one.last_seq.values()) > 240 for one in snapshot.collectives):
            break


def test_a_slow_link(jobs: Jobs) -> None:
    run = jobs.wait_fault("slow_link")
    try:
        event = jobs.event("slow_link", "slow_link", "0,1,2")  # the verdict may be over before it is asked for
    except AssertionError:
        records = (record for batch in read_batches(run) for record in batch.records if record.HasField("hardware"))
        full = [one for one in records if one.hardware.cpu_percent - one.hardware.cpu_nice_percent >= CPU_FULL]
        times_s = [jobs.bench.happened_s(run), *(one.time_s for one in full), time.time()]
        if max(later - earlier for earlier, later in itertools.pairwise(times_s)) < CPU_FULL_S:
            pytest.skip("the processors were full all the time: nothing is said of a link then")
        raise
    assert (event.attributes["group"], event.attributes["collective"]) == ("world", "all_reduce")
    assert "524,288 bytes" in event.message


def test_a_loader_that_gives_no_batch(jobs: Jobs) -> None:
    found, _ = jobs.verdict("data_stall")
    assert (found.kind, list(found.ranks)) == ("data_stall", [1])
    assert "last known in data" in found.message and "look at its data" in found.message


def test_a_loss_that_is_no_number(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("nan_that_spreads")
    assert (found.kind, list(found.ranks)) == ("nan_loss", [1])
    assert re.search(r"since step \d+", found.message) and snapshot.run.state == "running"


def test_a_loss_that_jumps(jobs: Jobs) -> None:
    event = jobs.event("loss_jumps", "loss_spike", "0,1,2")  # after a minute that is what the loss usually is
    assert event.level == pb.Event.WARNING
    assert "from about 1 to 7" in event.message


def test_a_rank_that_leaves_early(jobs: Jobs) -> None:
    found, _ = jobs.verdict("leaves")
    assert (found.kind, list(found.ranks)) == ("left_early", [1])
    assert "ended after step 60 while others wait" in found.message


def test_a_loader_s_worker_that_is_killed(jobs: Jobs) -> None:
    found, _ = jobs.verdict("worker_killed")
    assert list(found.ranks) == [1]
    assert "is killed by signal: Killed" in found.message or "exited unexpectedly" in found.message
    assert "loader's worker" in found.message


def test_a_control_group_that_holds_the_ranks(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("throttled")
    assert (found.kind, list(found.ranks)) == ("cpu_throttled", [0, 1, 2])
    assert "may use 0.3 cores by their control group" in found.message and snapshot.run.state == "running"


def test_data_that_all_wait_for(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("all_wait_for_data")
    assert (found.kind, list(found.ranks)) == ("data_bound", [0, 1, 2])
    assert "all ranks wait for data" in found.message and snapshot.run.state == "running"


def test_a_full_disk_does_not_stop_the_training(jobs: Jobs) -> None:
    found, snapshot = jobs.verdict("disk_full")
    assert found.kind == "disk_full" and "MiB left" in found.message
    assert snapshot.run.state == "running" and all(rank.state in ("running", "waiting") for rank in snapshot.ranks)


def test_pauses_raise_no_alarm(jobs: Jobs) -> None:
    """Evaluations on one rank, announced or not, and a slow checkpoint, each longer than a hang takes to be called."""
    run = jobs.wait_fault("pauses")
    step = max(rank.step for rank in jobs.bench.snapshot(run).ranks)
    while True:
        snapshot = jobs.bench.snapshot(run)
        alarms = [found for found in snapshot.diagnosis if found.kind != "straggler"]
        assert not alarms, alarms[0].message
        if min(rank.step for rank in snapshot.ranks) > step + 20:
            break
