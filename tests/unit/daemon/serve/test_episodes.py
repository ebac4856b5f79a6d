"""A verdict is told once an episode, however its numbers change."""

from __future__ import annotations

from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.runs.state import RunState
from distui.daemon.serve import live as live_module
from distui.daemon.serve.live import LiveRun
from distui.proto import telemetry_pb2 as pb


@pytest.fixture
def live(tmp_path: Path) -> LiveRun:
    run = RunFolder(tmp_path / "train-1")
    run.create()
    return LiveRun(RunState(run), 1)


def tell(live: LiveRun, **found: object) -> list[str]:
    """Tell of one verdict, or of none; return the kinds of all events so far."""
    diagnosis = [pb.Diagnosis(**found)] if found else []  # type: ignore[arg-type]
    live._tell(pb.Snapshot(run=pb.RunInfo(state="running"), diagnosis=diagnosis))
    return [event.event.kind for event in live.state.events.all()]


def test_a_straggler_is_one_event_though_its_collectives_go_on(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for seq in range(1, 60):
        told = tell(live, kind="straggler", ranks=[1], group="world", seq=seq, message=f"rank 1 is {seq} ms behind")
    assert told == ["straggler"]
    assert live.state.events.all()[0].event.level == pb.Event.WARNING
    assert tell(live) == ["straggler"]  # it may come back at once
    assert tell(live, kind="straggler", ranks=[1], group="world", seq=61, message="rank 1 is 9 ms behind") == told
    monkeypatch.setattr(live_module, "CALM_S", 0.0)
    assert tell(live) == ["straggler", "straggler_over"]


def test_a_loss_that_is_bad_now_and_then_is_one_event(live: LiveRun) -> None:
    for step in range(1, 40, 2):
        told = tell(live, kind="nan_loss", ranks=[1], message=f"the loss of rank 1 is nan since step {step}")
        assert told == tell(live) == ["nan_loss"]


def test_what_a_rank_died_of_is_told_when_it_is_known(live: LiveRun) -> None:
    tell(live, kind="dead_rank", ranks=[1], message="rank 1 is gone without a word")
    told = tell(live, kind="dead_rank", ranks=[1], message="rank 1 was ended by SIGSEGV")
    assert told == ["dead_rank", "dead_rank"]
    assert tell(live, kind="dead_rank", ranks=[1], message="rank 1 was ended by SIGSEGV") == told


def test_a_loss_that_rises_with_the_rate_is_one_line_of_information(live: LiveRun) -> None:
    source = pb.Source(rank=0, node="node", pid=1, incarnation=1)
    for step in range(1, 61):
        rate, loss = (1e-3, 2.0) if step > 50 else (1e-5, 2.5 if step == 1 else 1.0)
        body = pb.Step(step=step, step_s=0.5, loss=loss, learning_rate=rate)
        live.state.apply(pb.Batch(source=source, records=[pb.Record(seq=step, time_s=step, step=body)]))
        live._tell_rise()
    (event,) = (one.event for one in live.state.events.all())
    assert (event.kind, event.level) == ("loss_rise", pb.Event.INFO) and "rose at step 51" in event.message
