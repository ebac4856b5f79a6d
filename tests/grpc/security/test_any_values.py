"""Records that are well-formed and hold any values: whoever may publish ends no daemon, nor takes its memory."""

from __future__ import annotations

import json
import math
import random
import resource
import socket as sockets
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from distui.core.paths import RunFolder
from distui.daemon.runs.batches import Malformed, check
from distui.daemon.runs.snapshot import snapshot_json, take_snapshot
from distui.daemon.runs.state import RunState
from distui.daemon.serve import live as live_runs
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank

BODIES = [field.name for field in pb.Record.DESCRIPTOR.fields if field.message_type is not None]
DOUBLES = (math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e300, -1e308, 1.0, 0.02)
NAMES = ("world", "tp[0,1]", "world[0>1]", "g[0-9999999999]", "g[0-9:0]", "g[-5--1]", "g[4,", "world_size", "num_nodes")
TEXTS = (
    *("", "0", "-1", "9" * 30, "²", "failed", "finished", "restart", "started_again", "forward", "evaluation", "data"),
    *("all_reduce world#7", f"all_reduce g[0-9999999999]#{'9' * 30}", "recv #", *NAMES),
)
MORE_MEMORY_BYTES = 1 << 30


def _scalar(field: Any, draw: random.Random) -> Any:
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return draw.choice((*DOUBLES, time.time() - 50))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw.choice([value.number for value in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw.choice(TEXTS)
    bits = 64 if "64" in str(field.cpp_type) or field.type in (3, 4, 6, 16, 18) else 32
    signed = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return draw.choice((low, high, 0, 1, 2, 100))


def _fill(message: Message, draw: random.Random, share: float) -> None:
    for field in message.DESCRIPTOR.fields:
        if draw.random() > share:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            name = draw.choice(NAMES) if key.type == FieldDescriptor.TYPE_STRING else 1
            getattr(message, field.name)[name] = _scalar(value, draw)
        elif field.message_type is not None:
            one = getattr(message, field.name)
            _fill(one.add() if field.is_repeated else one, draw, share)
        elif field.is_repeated:
            getattr(message, field.name).append(_scalar(field, draw))
        else:
            setattr(message, field.name, _scalar(field, draw))


def _batch(run: RunFolder, draw: random.Random, seqs: Counter[int]) -> pb.Batch:
    rank = draw.choice((-2, -1, 0, 1, 1, 2, 2, 0))
    source = pb.Source(
        rank=rank,
        node=draw.choice((sockets.gethostname(), "other")),
        pid=draw.choice((0, 1, (1 << 22) - 1, (1 << 32) - 1)),
        incarnation=draw.choice((1, (1 << 63) - 1, (1 << 64) - 1)),
    )
    batch = pb.Batch(run_id=run.run_id, run_dir=str(run.path), source=source)
    for _ in range(draw.randint(1, 4)):
        seqs[rank] += 1
        record = batch.records.add(seq=seqs[rank], time_s=draw.choice((*DOUBLES, time.time(), time.time())))
        body = getattr(record, draw.choice(BODIES))
        body.SetInParent()
        _fill(body, draw, draw.random())
    return batch


@pytest.fixture
def little_memory() -> Any:
    """Allow this process no more than some memory on top of what it has."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MORE_MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("programs", [30, pytest.param(3000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)])])
def test_records_of_any_values_can_be_judged(programs: int, tmp_path: Path, little_memory: None) -> None:
    for seed in range(programs):
        draw, seqs = random.Random(seed), Counter[int]()
        run = RunFolder(tmp_path / f"run-{seed}")
        run.create()
        run.spec.write_text(json.dumps({"world_size": 3, "started_s": time.time() - 50}))
        state = RunState(run)
        for _ in range(draw.randint(1, 30)):
            batch = _batch(run, draw, seqs)
            try:
                check(batch, forwarded=True)
            except Malformed:
                continue
            if state.only_new(batch):
                state.apply(batch, time.time())
        snapshot = take_snapshot(state, time.time())
        assert json.dumps(snapshot_json(snapshot)) and snapshot.SerializeToString(), seed


def test_names_and_numbers_that_lie_end_no_daemon(node: Node) -> None:
    ranks: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    node.start()
    lies, other = node.run("lies"), node.run("other", world_size=1)
    ranks(other, 0, world_size=1).started().steps(1, 3).publish()
    since_s = time.time() - 60
    for rank in (0, 1):
        waiting = f"all_reduce tp[0-{10**11}]#{'9' * 30}"
        body = pb.Collective(group="world", op="all_reduce", bytes=(1 << 64) - 1, seq=rank + 1, group_size=1)
        source = ranks(lies, rank).started().add(collective=body).add(collective=body)
        source.beat(step=7, phase="forward", waiting_in=waiting, waiting_since_s=since_s)
        source.source.node = "another"
        source.publish()
    assert len(node.snapshot(lies).ranks) == 2
    listed = node.monitor.ListRuns(pb.ListRunsRequest(), timeout=60).runs
    assert {info.run_id for info in listed} == {"lies", "other"}
    assert node.daemon is not None and node.daemon.poll() is None
    assert node.snapshot(other).ranks[0].step == 3


def test_a_run_that_cannot_be_judged_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever nobody has thought of: here a verdict that fails for one run."""
    runs, found = LiveRuns(), {}
    for name in ("bad", "good"):
        folder = RunFolder(tmp_path / name)
        folder.create()
        folder.spec.write_text(json.dumps({"world_size": 1, "started_s": time.time()}))
        found[name] = runs.runs[folder.path] = LiveRun(RunState(folder), 1)
    whole = live_runs.take_snapshot

    def fails(state: RunState, now_s: float) -> pb.Snapshot:
        if state.run.run_id == "bad":
            raise ZeroDivisionError("a share of nothing")
        return whole(state, now_s)

    monkeypatch.setattr(live_runs, "take_snapshot", fails)
    for _ in range(2):
        runs.tick()
        found["bad"]._snapshot_s = 0.0
    assert (
        found["bad"].snapshot().run.message == "the daemon cannot judge this run: ZeroDivisionError: a share of nothing"
    )
    assert found["good"].snapshot().run.state == "starting"
    assert [record.message for record in caplog.records] == ["bad cannot be judged"]
