"""Who is to blame for a run that has failed: from what its ranks left behind, all of them gone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.core.telemetry.ledger import Ledger
from distui.daemon.diagnosis.observe import observe
from distui.daemon.diagnosis.verdicts import diagnose
from distui.daemon.runs.state import RunState
from distui.proto import telemetry_pb2 as pb

NOW_S = 1.8e9
NO_PROCESS = (1 << 22) - 1
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
TIMED_OUT = "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 12000 ms"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "train-1")
    folder.create()
    return folder


def failed(run: RunFolder, entered: tuple[int, int], error: str, *, status: int | None = None) -> list[pb.Diagnosis]:
    """Let rank 0 fail of `error` after so many collectives of each, and rank 1 end without a word: by `status`."""
    for rank, count in enumerate(entered):
        ledger = Ledger(run.rank_ledger(rank), rank=rank, world_size=2, capacity=64, incarnation=1)
        ledger.set_step(60)
        for _ in range(count):
            token = ledger.begin("world", "barrier", "", 0, 2)
        if rank == 0:
            ledger.ended(1, error)
        elif count:
            ledger.end(token)
    told = [{"rank": 0, "exit_status": 1, "signal": None, "error": error}]
    told.append({"rank": 1, "exit_status": status, "signal": None if status is not None else 15, "error": ""})
    run.outcome.write_text(json.dumps({"state": "failed", "failed_rank": 0, "ranks": told}))
    state = RunState(run)
    state.info.world_size, state.info.state = 2, "failed"
    for rank in range(2):
        source = pb.Source(rank=rank, node=socket.gethostname(), pid=NO_PROCESS, incarnation=1)
        record = pb.Record(seq=1, time_s=NOW_S, step=pb.Step(step=41, step_s=0.1))
        state.apply(pb.Batch(source=source, records=[record]), NOW_S)
    return diagnose(state, observe(state, NOW_S), NOW_S)


def test_who_left_by_os_exit_is_named_before_who_lost_it(run: RunFolder) -> None:
    (found,) = failed(run, (61, 60), LOST, status=0)
    assert (found.kind, list(found.ranks)) == ("left_early", [1])
    assert "rank 0" in found.message and "barrier #61 of world" in found.message


def test_whom_the_others_waited_for_is_named_when_their_time_is_over(run: RunFolder) -> None:
    (found,) = failed(run, (61, 60), TIMED_OUT)
    assert (found.kind, list(found.ranks), found.seq) == ("hang", [1], 61)
    assert "rank 1" in found.message.partition("never came to barrier #61 of world")[0]


@pytest.mark.parametrize("error", [TIMED_OUT, LOST, "ValueError: boom"])
def test_who_failed_where_all_have_come_is_named_with_its_last_step(run: RunFolder, error: str) -> None:
    (found,) = failed(run, (60, 60), error)
    assert (found.kind, list(found.ranks)) == ("dead_rank", [0])
    assert "after step 60" in found.message, "as its ledger has it, not what was told of it last"
