"""A clock that jumps makes nobody hang, and nobody another process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.observe import DEAD, RUNNING, observe, this_node
from distui.daemon.node import processes
from distui.daemon.node.clock import Clock
from distui.daemon.runs.state import RunState
from distui.daemon.serve.live import LiveRun
from distui.proto import telemetry_pb2 as pb


def test_only_jumps_are_told() -> None:
    wall, steady = 1000.0, 5.0
    clock = Clock(lambda: wall, lambda: steady)
    wall, steady = 1010.0, 15.0
    assert clock.jumped_s() == 0.0
    wall, steady = 1010.9, 15.2
    assert clock.jumped_s() == 0.0, "slewed"
    wall, steady = 4612.0, 16.2
    assert clock.jumped_s() == pytest.approx(3600.1)
    assert clock.jumped_s() == 0.0
    wall, steady = 1012.0, 17.2
    assert clock.jumped_s() == pytest.approx(-3601.0)


@pytest.fixture
def live(tmp_path: Path) -> LiveRun:
    run = RunFolder(tmp_path / "train-1")
    run.create()
    state = RunState(run)
    state.info.world_size = 2
    now_ns = time.time_ns()
    for rank, waiting in ((0, "all_reduce world#5"), (1, "")):
        source = pb.Source(rank=rank, node=this_node(), pid=os.getpid(), incarnation=now_ns)
        beat = pb.Heartbeat(
            step=9, phase="idle", waiting_in=waiting, waiting_since_s=time.time(), last_seq={"world": 5 - rank}
        )
        records = [
            pb.Record(seq=1, time_s=time.time(), step=pb.Step(step=9, step_s=0.1)),
            pb.Record(seq=2, time_s=time.time(), heartbeat=beat),
        ]
        state.apply(pb.Batch(source=source, records=records), time.time())
    return LiveRun(state, 1)


@pytest.mark.parametrize("jump_s", [7200.0, -7200.0])
def test_nobody_hangs_since_before_the_jump(live: LiveRun, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    assert not live.snapshot().diagnosis
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    live._clock = Clock(lambda: real(), time.monotonic)
    live._clock._wall = time.time
    live._snapshot_s = 0.0
    found = live.snapshot()
    assert not found.diagnosis and [rank.state for rank in found.ranks] == ["running", "running"]
    (event,) = [event.event for event in live.state.events.all()]
    assert event.kind == "clock_jump" and f"jumped by {jump_s:+.0f} s" in event.message
    (waiting, _) = observe(live.state, time.time() + 20)
    assert waiting.wait is not None and 19 < time.time() + 20 - waiting.wait.since_s < 25, "counted from then on"


def test_a_process_stays_the_same_when_the_system_tells_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    began_s = time.time()
    assert processes.process_state(os.getpid(), began_s) == RUNNING
    monkeypatch.setattr(processes, "_boot_times_s", [processes._read_boot_s()])
    true_s = processes._read_boot_s()
    monkeypatch.setattr(processes, "_read_boot_s", lambda: true_s + 7200.0)
    processes.clock_was_set()
    assert processes.process_state(os.getpid(), began_s) == RUNNING
    assert processes.process_state(os.getpid(), began_s - 7200.0) == DEAD, "another that has its pid"
