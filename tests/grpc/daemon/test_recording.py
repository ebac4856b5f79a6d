"""A run's log played again: at each moment the state is what the records up to then give, whichever way one came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from textual.widgets import Static

from distui.core.errors import DaemonUnavailable
from distui.core.paths import RunFolder
from distui.daemon.runs import recording as recording_module
from distui.daemon.runs.recording import Recording
from distui.daemon.runs.snapshot import load_state
from distui.daemon.runs.state import DAEMON
from distui.daemon.runs.store import RunLog
from distui.launcher.report.replay import Replay
from distui.proto import telemetry_pb2 as pb
from distui.tui.monitor.app import DashboardApp
from distui.tui.widgets.keys import KeyLine

START_S = 1_767_225_600.0
NUM_RANKS, NUM_STEPS, STEP_S = 2, 200, 0.1


def source(rank: int) -> pb.Source:
    return pb.Source(rank=rank, node="node00", pid=100 + rank, incarnation=int(START_S * 1e9))


def batch(run: RunFolder, rank: int, records: list[pb.Record]) -> pb.Batch:
    return pb.Batch(run_id=run.run_id, source=source(rank), records=records)


def verdict(seq: int, time_s: float, kind: str, level: pb.Event.Level) -> pb.Record:
    about = {"ranks": "1", "group": "world", "seq": "7"}
    return pb.Record(seq=seq, time_s=time_s, event=pb.Event(level=level, kind=kind, message="", attributes=about))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Give the folder of a run of 20 s: 2 ranks, 200 steps, a hang from 12 s to 15 s, finished."""
    folder = RunFolder(tmp_path / "run-1")
    folder.logs.mkdir(parents=True)
    folder.spec.write_text(f'{{"run_id": "run-1", "started_s": {START_S}, "world_size": {NUM_RANKS}}}')
    log = RunLog(folder)
    seqs = [0] * NUM_RANKS
    for first in range(0, NUM_STEPS, 5):
        for rank in range(NUM_RANKS):
            records = []
            for step in range(first + 1, first + 6):
                seqs[rank] += 1
                made = pb.Step(step=step, step_s=STEP_S, loss=100.0 / step, tokens=10)
                records.append(pb.Record(seq=seqs[rank], time_s=START_S + step * STEP_S, step=made))
            seqs[rank] += 1
            beat = pb.Heartbeat(step=first + 5, phase="backward", log_bytes=(first + 5) * 8)
            records.append(pb.Record(seq=seqs[rank], time_s=START_S + (first + 5) * STEP_S, heartbeat=beat))
            log.append(batch(folder, rank, records))
        if first == 120:
            log.append(batch(folder, DAEMON, [verdict(1, START_S + 12, "hang", pb.Event.ERROR)]))
        if first == 150:
            log.append(batch(folder, DAEMON, [verdict(2, START_S + 15, "hang_over", pb.Event.INFO)]))
    finished = pb.RunFinished(state="finished", exit_status=0)
    log.append(batch(folder, -1, [pb.Record(seq=1, time_s=START_S + 20.5, run_finished=finished)]))
    log.close()
    folder.rank_log(0).write_text("".join(f"step {step:02d}\n" if step < 100 else "" for step in range(1, 201)))
    return folder


def drain(slices: Iterator[float]) -> None:
    shares = list(slices)
    assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)


def opened(run: RunFolder) -> Recording:
    found = Recording(run)
    drain(found.read_more())
    return found


def seen(found: Recording) -> tuple[str, list[int], int, list[str]]:
    """Return state, each rank's step, number of whole steps and the kinds of verdicts at the cursor."""
    snapshot = found.snapshot()
    steps = found.state.steps.history.all()
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    return snapshot.run.state, [rank.step for rank in snapshot.ranks], len(steps), [d.kind for d in snapshot.diagnosis]


def test_the_state_follows_the_cursor_forwards_and_back(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "MIN_COPY_RECORDS", 60)
    monkeypatch.setattr(recording_module, "SLICE_BATCHES", 3)
    found = opened(run)
    assert (found.first_s, found.last_s) == (START_S + STEP_S, START_S + 20.5)
    fresh = {}
    moments = [0.05, 0.1, 5.04, 5.05, 12.01, 14.99, 15.01, 19.96]
    for at_s in moments:
        drain(found.move(START_S + at_s))
        fresh[at_s] = seen(found)
    assert fresh[0.05][:2] == ("starting", [])
    assert fresh[5.05] == ("running", [50, 50], 50, []) and fresh[12.01][3] == ["hang"]
    assert fresh[12.01][0] == "stalled" and fresh[14.99][3] == ["hang"] and fresh[15.01][0] == "running"
    drain(found.move(found.last_s))
    assert seen(found)[0] == "finished" and seen(found)[2] == NUM_STEPS and found.at_end
    assert len(load_state(run).steps.history.all()) == NUM_STEPS
    assert len(found._copies) > 3
    randomly = random.Random(3)
    for _ in range(20):
        at_s, epoch, before_s = randomly.choice(moments), found.epoch, found.at_s
        drain(found.move(START_S + at_s))
        assert seen(found) == fresh[at_s], at_s
        assert found.epoch == epoch + (START_S + at_s < before_s), "going back voids what was shown"


def test_a_verdict_lasts_as_long_as_the_cursor_says(run: RunFolder) -> None:
    found = opened(run)
    drain(found.move(START_S + 13.5))
    (hang,) = found.snapshot().diagnosis
    assert (list(hang.ranks), hang.group, hang.seq, hang.since_s) == ([1], "world", 7, pytest.approx(1.5))


def test_a_run_that_is_still_written_is_read_on_and_what_comes_late_is_taken_in(run: RunFolder) -> None:
    found = opened(run)
    drain(found.move(START_S + 10))
    log = RunLog(run)
    late = pb.Event(kind="checkpoint", message="late")
    log.append(batch(run, 5, [pb.Record(seq=1, time_s=START_S + 3, event=late)]))
    log.append(batch(run, 5, [pb.Record(seq=2, time_s=START_S + 30, event=pb.Event(kind="evaluation"))]))
    log.close()
    drain(found.read_more())
    assert [event.event.message for event in found.state.events.all()] == ["late"]
    assert found.last_s == START_S + 30
    drain(found.move(START_S + 1))
    assert not found.state.events.all()
    drain(found.move(START_S + 5))
    assert [event.event.message for event in found.state.events.all()] == ["late"]


async def test_the_footer_of_a_recording_offers_only_what_works(run: RunFolder) -> None:
    app = DashboardApp("run-1", recording=Replay(run))
    async with app.run_test(size=(80, 24)) as pilot:
        shown: set[str] = set()
        while app.model.snapshot is None or not {"Play", "Go to", "Help", "Quit"} <= shown:
            await pilot.pause(0.01)
            shown = set(app.screen.query_one(KeyLine).shown)
        assert not shown & {"Control", "Pause"}
        commands = {command.title for command in app.get_system_commands(app.screen)}
        assert "Quit" in commands and not any(title.startswith(("Job:", "Pause")) for title in commands)
        await pilot.press("question_mark")
        told = ""
        while "space" not in told:
            await pilot.pause(0.01)
            told = "\n".join(str(part.content) for part in app.screen.query(Static))
        assert "act on the job" not in told


def test_an_empty_log_is_no_error(tmp_path: Path) -> None:
    found = opened(RunFolder(tmp_path / "run-2"))
    assert (found.first_s, found.last_s, found.num_records) == (0.0, 0.0, 0)


async def test_the_player_plays_pauses_seeks_and_cuts_the_logs(run: RunFolder) -> None:
    replay = Replay(run)
    replay.playing = False
    updates = replay.watch("run-1", 0.01)
    first = await updates.__anext__()
    assert len(first.steps) <= 1 and replay.at_s == replay.first_s

    async def after(what: float) -> pb.Update:
        replay.seek(START_S + what)
        return await asyncio.wait_for(updates.__anext__(), 120)

    forward = await after(5.05)
    assert [step.step for step in forward.steps][-1] == 50 and forward.server_time_s == START_S + 5.05
    reply = await replay.read_log("run-1", 0, -64, 1000)
    assert reply.size == 50 * 8 and reply.data.decode().splitlines()[-1] == "step 50"
    back = await after(2.05)
    assert replay.epoch == 1 and [step.step for step in back.steps] == list(range(1, 21))
    for _ in range(10):
        replay.change_speed(1)
    assert replay.speed == 64
    replay.play_or_pause()
    deadline = time.monotonic() + 120
    while replay.at_s < replay.last_s and time.monotonic() < deadline:
        last = await asyncio.wait_for(updates.__anext__(), 120)
    assert last.snapshot.run.state == "finished"
    replay.seek(START_S + 1)
    assert (await asyncio.wait_for(updates.__anext__(), 120)).snapshot.run.state == "running"
    with pytest.raises(DaemonUnavailable, match="recording"):
        async for _ in replay.execute("run-1", "stop"):
            raise AssertionError
    await updates.aclose()
