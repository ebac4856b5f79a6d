"""The first cause is told, never one of its victims; and whether a failed job is started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from distui.core.config.schema import CheckpointSection
from distui.core.paths import RunFolder
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.verdict import first_cause
from distui.launcher.job.outcome import Ending, Outcome
from distui.launcher.node.restarts import Restarts, newest_checkpoint, put_away

PLACES = {0: (0, 1), 1: (1, 2)}
LOST_PEER = "[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:4: Connection reset by peer"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def raised(run: RunFolder, rank: int, time_s: float, message: str, kind: str = "RuntimeError") -> Ending:
    report = {"type": kind, "message": message, "time_s": time_s, "rank": rank}
    run.rank_error(rank).write_text(json.dumps(report))
    return Ending(rank, 100 + rank, 1, None, time_s + 0.2)


def lost(at_s: float) -> Member:
    return Member(Host("gpu2", 2), 1, stage="lost", lost="its agent has ended", lost_s=at_s)


def test_a_rank_that_was_killed_comes_before_those_that_lost_it(run: RunFolder) -> None:
    endings = {0: raised(run, 0, 10.0, LOST_PEER), 1: Ending(1, 101, None, signal.SIGKILL, 10.4)}
    endings[2] = raised(run, 2, 10.1, LOST_PEER)
    outcome = first_cause(run, endings, [], PLACES, 0.0)
    assert (outcome.failed_rank, outcome.is_victim) == (1, False) and outcome.message == "rank 1: killed by SIGKILL"


def test_a_kill_that_was_noticed_late_comes_before_them_too(run: RunFolder) -> None:
    endings = {0: raised(run, 0, 10.0, LOST_PEER), 1: Ending(1, 101, None, signal.SIGKILL, 12.0)}
    assert first_cause(run, endings, [], PLACES, 0.0).failed_rank == 1
    ours = {0: raised(run, 0, 10.0, "bad batch", "ValueError"), 1: Ending(1, 101, None, signal.SIGKILL, 13.3)}
    assert first_cause(run, ours, [], PLACES, 0.0).failed_rank == 0, "killed by us, after its grace period"


def test_a_lost_host_comes_before_the_ranks_that_lost_theirs(run: RunFolder) -> None:
    outcome = first_cause(run, {0: raised(run, 0, 10.0, LOST_PEER)}, [lost(10.5)], PLACES, 0.0)
    assert outcome.failed_rank is None and outcome.message == "gpu2 (node 1, ranks 1-2): its agent has ended"
    assert [rank.error for rank in outcome.ranks[1:]] == ["its host was lost"] * 2


def test_a_rank_that_failed_by_itself_before_a_host_was_lost_is_the_cause(run: RunFolder) -> None:
    endings = {0: raised(run, 0, 10.0, "bad batch", "ValueError")}
    assert first_cause(run, endings, [lost(20.0)], PLACES, 0.0).message == "rank 0: ValueError: bad batch"
    assert first_cause(run, endings, [lost(5.0)], PLACES, 0.0).message.startswith("gpu2"), "and after it, it is not"


def test_where_all_only_lost_a_peer_that_is_said(run: RunFolder) -> None:
    outcome = first_cause(run, {0: raised(run, 0, 10.0, LOST_PEER)}, [], PLACES, 0.0)
    assert outcome.is_victim and outcome.failed_rank == 0


def failed() -> Outcome:
    return Outcome("failed", 3, "rank 1: ValueError: bad batch", failed_rank=1)


def test_restarts_end_where_they_lead_nowhere(run: RunFolder) -> None:
    restarts = Restarts(9)
    for step in (35, 35, 47, 47):
        assert restarts.wanted(failed(), step) == ""
        restarts.begin(run, failed(), step, 3)
    assert "came to step 47 and not beyond" in restarts.wanted(failed(), 40)
    assert [one["step"] for one in json.loads(run.restarts.read_text())["restarts"]] == [35, 35, 47, 47]


@pytest.mark.parametrize(
    ("outcome", "max_restarts"),
    [
        (failed(), 0),
        (Outcome("stopped", 143, "stopped by SIGTERM"), 5),
        (Outcome("stopped", 75, "gave way"), 5),
        (Outcome("failed", 1, "a bug"), 5),
        (Outcome("finished", 0, ""), 5),
    ],
)
def test_only_a_failure_of_ranks_is_started_again(outcome: Outcome, max_restarts: int) -> None:
    assert Restarts(max_restarts).wanted(outcome, 10)


def test_as_many_restarts_as_were_allowed(run: RunFolder) -> None:
    restarts = Restarts(1)
    assert restarts.wanted(failed(), 1) == ""
    restarts.begin(run, failed(), 1, 3)
    assert "max_restarts=1" in restarts.wanted(failed(), 2)


def test_errors_of_an_attempt_are_put_away(run: RunFolder) -> None:
    raised(run, 1, 1.0, "bad batch")
    run.ending.write_text("{}")
    put_away(run, 0, 3)
    assert not run.ending.exists() and not run.rank_error(1).exists()
    assert json.loads((run.errors / "attempt0-rank1.txt").read_text())["message"] == "bad batch"


def test_the_checkpoint_that_is_named_is_the_one_that_the_engine_goes_on_from(tmp_path: Path) -> None:
    run, chosen = RunFolder(tmp_path / "mine"), CheckpointSection(dir=str(tmp_path / "ck"))
    assert newest_checkpoint(run, chosen) is None
    for step, saved_at_s, run_id, provisional in (
        (10, 5.0, "mine", False),
        (20, 3.0, "mine", False),
        (40, 7.0, "mine", True),
        (50, 8.0, "another's", False),
    ):
        folder = tmp_path / "ck" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        facts = {"step": step, "saved_at_s": saved_at_s, "run": run_id, "provisional": provisional}
        (folder / "manifest.json").write_text(json.dumps(facts))
    (tmp_path / "ck" / "step_00000030").mkdir()
    assert newest_checkpoint(run, chosen) == 10
    assert newest_checkpoint(run, chosen.model_copy(update={"resume": "always"})) == 50
