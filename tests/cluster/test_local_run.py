"""One job on two "hosts" that are both this machine: real agents, TLS, relayed telemetry, a restart."""

from __future__ import annotations

import json

import psutil
import pytest

from distui.launcher.job.outcome import read_outcome
from tests.cluster.conftest import Place, last_of_each

LOCAL = ("--set", "cluster.starter=local", "--set", "telemetry.flush_s=0.1")


def left_of(place: Place) -> list[str]:
    """Return the processes of the job that are still there: all but the daemon."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environ = " ".join(process.info["cmdline"] or ()), process.info["environ"] or {}
        ours = str(place.path) in words or environ.get("DISTUI_STATE_DIR") == place.environ["DISTUI_STATE_DIR"]
        if ours and "distui.daemon" not in words:
            found.append(words)
    return found


def test_a_job_on_two_hosts_is_one_run_and_goes_on_after_a_kill(place: Place) -> None:
    options = {"out": "two", "kill": 7, "rank": 2}
    done = place.distui(
        "launch", "--hosts", "a:2,b:1", *LOCAL, "--max-restarts", "1", "--set", "checkpoint.every_steps=5",
        "steps.py", json.dumps(options),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 ranks on 2 nodes" in done.stderr
    assert "rank 2: killed by SIGKILL; restart 1 of 1, from the checkpoint of step 5" in done.stderr
    (run,) = place.runs()
    outcome = read_outcome(run)
    assert outcome is not None and (outcome.state, outcome.restarts) == ("finished", 1)
    assert [rank.host for rank in outcome.ranks] == ["a", "a", "b"]
    status = json.loads(place.distui("status", "--json").stdout)
    assert status["run"] == run.run_id and status["restarts"] == 1 and not status["diagnosis"]
    effort = status["effort"]
    lost = [effort[f"{name}_s"] for name in ("start", "notice", "waiting", "restart", "replay")]
    assert all(part > 0 for part in lost) and 0 < effort["effective"] < 1, effort
    assert effort["effective"] * effort["wall_s"] == pytest.approx(effort["wall_s"] - sum(lost))
    told = place.distui("status").stdout
    assert "started again 1 time; " in told and "was new training; start " in told, told
    page = place.distui("report", "-o", "page.html")
    assert page.returncode == 0 and "was new training" in (place.path / "page.html").read_text()
    assert [(rank["rank"], rank["step"], rank["state"]) for rank in status["ranks"]] == [
        (rank, 12, "finished") for rank in range(3)
    ]
    assert not left_of(place)
    # As if nobody had killed it, on one node and without a supervisor.
    whole = place.distui("launch", "--nproc", "3", "steps.py", json.dumps({"out": "whole"}))
    assert whole.returncode == 0, whole.stderr
    for rank in range(3):
        assert last_of_each(place.steps("two", rank)) == last_of_each(place.steps("whole", rank))
        assert {one["attempt"] for one in place.steps("two", rank)} == {0, 1}


def test_what_cannot_start_is_told_in_three_lines_and_no_rank_is_started(place: Place) -> None:
    done = place.distui(
        "launch", "--hosts", "a,b", "--nproc", "1", *LOCAL, "--set", "cluster.interface=none0", "steps.py", "{}"
    )
    assert done.returncode == 2
    what, why, fix, *_ = (line for line in done.stderr.splitlines() if not line.startswith("distui:"))
    assert what == "error: there is no interface none0 on this host"
    assert why.startswith("  why: it has lo (127.0.0.1)") and fix == "  fix: set cluster.interface to one"
    (run,) = place.runs()
    assert not list(run.logs.glob("rank*")) and not left_of(place)
    for words, told in (
        (("--hosts", "a", "--set", "cluster.starter=shs"), "there is no starter 'shs'"),
        (("--hosts", "a,a"), "names a again"),
        (("--hosts", ""), "--hosts names no host"),
        (("--hosts", "a", "--node-rank", "1"), "--node-rank"),
        (("--include", "a"), "--include and --exclude choose among hosts"),
    ):
        done = place.distui("launch", *words, "steps.py", "{}")
        assert done.returncode == 2 and told in done.stderr, done.stderr
    assert len(place.runs()) == 1


def test_the_check_of_hosts_prints_a_table(place: Place) -> None:
    done = place.distui("cluster", "check", "--hosts", "a:2,b:1", *LOCAL, "steps.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["host", "state"]
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["a", "ok"], ["b", "ok"]]
    assert "2 hosts can train together" in done.stdout
    done = place.distui("cluster", "check", "--hosts", "a,b", *LOCAL, "gone.py")
    assert done.returncode == 2 and "a, b: " in done.stdout and "gone.py is not there" in done.stdout
