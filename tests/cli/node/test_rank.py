"""The first code of a rank, without elastic around it: logs, exit statuses, and what is kept of an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distui.core.paths import JOB_ENV, RunFolder
from distui.core.telemetry.ledger import Ledger
from distui.launcher.job.ending import end_line, failure_report
from distui.launcher.job.outcome import Ending, Outcome, RankOutcome, judge, last_step
from distui.launcher.job.processes import AGENT_PID_ENV, request_stop, stop_requested


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run's folder without telemetry."""
    folder = RunFolder(tmp_path / "run-1")
    folder.create()
    folder.config.write_text("[telemetry]\nenabled = false\n")
    return folder


def rank_of(run: RunFolder, code: str, *arguments: str) -> tuple[int, str, dict[str, Any] | None]:
    """Run `code` as rank 0; return its exit status, its log, and its error file."""
    script = run.path.parent / "train.py"
    script.write_text(code, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {JOB_ENV: str(run.path), AGENT_PID_ENV: str(os.getpid()), "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-u", "-m", "distui.launcher.node.rank", str(script), *arguments]
    done = subprocess.run(command, env={**environ, "WORLD_SIZE": "1"}, capture_output=True, text=True, timeout=180)
    assert done.stdout + done.stderr == ""
    error = run.rank_error(0)
    return (
        done.returncode,
        run.rank_log(0).read_text("utf-8"),
        json.loads(error.read_text()) if error.exists() else None,
    )


@pytest.mark.parametrize(
    ("code", "status", "log", "kind"),
    [
        ("print('fine')", 0, "fine\n", None),
        ("import sys; sys.exit()", 0, "", None),
        ("import sys; sys.exit(5)", 5, "", "SystemExit"),
        ("import sys; sys.exit('no data found')", 1, "no data found\n", "SystemExit"),
        ("raise KeyboardInterrupt", 130, "", None),
        ("import os; os._exit(9)", 9, "", None),
        ("import sys; sys.stderr = None", 0, "", None),
    ],
)
def test_exit_statuses_are_the_scripts(run: RunFolder, code: str, status: int, log: str, kind: str | None) -> None:
    found_status, found_log, error = rank_of(run, code)
    assert (found_status, found_log) == (status, log)
    assert (error["type"] if error else None) == kind


def test_an_exception_is_told_as_python_tells_it(run: RunFolder) -> None:
    status, log, error = rank_of(run, "def f():\n    raise KeyError('weight')\n\nf()\n")
    assert status == 1 and error is not None
    assert log.startswith("Traceback (most recent call last):\n  File ") and log.endswith("KeyError: 'weight'\n")
    assert log == error["traceback"] and log.count("File ") == 2
    assert (error["rank"], error["type"], error["message"], error["step"]) == (0, "KeyError", "'weight'", None)


def test_a_syntax_error_names_the_line(run: RunFolder) -> None:
    status, log, error = rank_of(run, "x = 1\nprint('x'\n")
    assert status == 1 and error is not None and error["type"] == "SyntaxError"
    assert 'train.py", line 2' in log and "runpy" not in log


def test_the_scripts_own_excepthook_is_asked(run: RunFolder) -> None:
    code = "import sys\nsys.excepthook = lambda kind, error, trace: print('mine', kind.__name__)\n1 / 0\n"
    status, log, error = rank_of(run, code)
    assert (status, log) == (1, "mine ZeroDivisionError\n")
    assert error is not None and error["type"] == "ZeroDivisionError"


def test_too_many_open_files_are_kept_as_the_error_that_they_are(run: RunFolder) -> None:
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "kept = [open('/dev/null') for _ in range(100)]\n"
    )
    status, log, error = rank_of(run, code)
    assert status == 1 and error is not None and "Too many open files" in error["message"]
    assert log == error["traceback"]


def test_an_error_that_cannot_be_kept_is_told_all_the_same(run: RunFolder) -> None:
    status, log, error = rank_of(run, f"import shutil\nshutil.rmtree({str(run.errors)!r})\n1 / 0\n")
    assert status == 1 and error is None
    assert "ZeroDivisionError: division by zero\ndistui: " in log and log.count("Traceback") == 1


def test_classes_of_the_script_can_be_pickled_for_spawned_children(run: RunFolder) -> None:
    code = (
        "import multiprocessing\n"
        "class Sample:\n    def __init__(self, value): self.value = value\n"
        "def double(sample): return sample.value * 2\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [Sample(21)]))\n"
    )
    status, log, _ = rank_of(run, code)
    assert (status, log) == (0, "[42]\n")


def test_a_rank_without_its_agent_ends_at_once(run: RunFolder) -> None:
    script = run.path.parent / "train.py"
    script.write_text("print('ran')")
    environ = {**os.environ, JOB_ENV: str(run.path), AGENT_PID_ENV: "1", "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-m", "distui.launcher.node.rank", str(script)], env=environ, timeout=180)
    assert done.returncode == -9
    assert not run.rank_log(0).exists()


# ---- which rank was first, and how it is told -----------------------------------------------------------------------


def raised(
    run: RunFolder, rank: int, time_s: float, kind: str = "ValueError", step: int | None = 7, message: str = "boom"
) -> None:
    trace = "Traceback (most recent call last):\n" + "".join(f'  File "m.py", line {n}\n' for n in range(40)) + kind
    report = {"rank": rank, "host": "node7", "pid": 1, "type": kind, "message": message, "traceback": trace}
    run.rank_error(rank).write_text(json.dumps({**report, "step": step, "time_s": time_s}))


def judged(run: RunFolder, *endings: Ending) -> Outcome:
    return judge(run, "failed", 3, "", {ending.rank: ending for ending in endings}, 0, 3)


def test_the_earliest_error_is_the_first_failure(run: RunFolder) -> None:
    raised(run, 2, 100.0)
    raised(run, 0, 100.3, "ConnectionError")
    outcome = judged(run, Ending(0, 1, 1, None, 100.4), Ending(1, 2, None, 15, 100.5), Ending(2, 3, 1, None, 100.6))
    assert (outcome.failed_rank, outcome.message) == (2, "rank 2: ValueError: boom")


def test_a_killed_rank_comes_before_the_errors_it_causes(run: RunFolder) -> None:
    raised(run, 0, 100.0, "ConnectionError")
    outcome = judged(run, Ending(0, 1, 1, None, 100.2), Ending(1, 2, None, 9, 100.1), Ending(2, 3, None, 15, 100.3))
    assert (outcome.failed_rank, outcome.message) == (1, "rank 1: killed by SIGKILL")


def test_a_limit_that_was_reached_comes_before_the_errors_it_causes(run: RunFolder) -> None:
    raised(run, 0, 100.0, "ConnectionError")
    outcome = judged(run, Ending(0, 1, None, 15, 100.2), Ending(1, 2, None, signal.SIGXCPU, 100.1))
    assert outcome.failed_rank == 1
    assert "its limit of processor time" in failure_report(run, outcome)


def test_who_lost_a_peer_is_not_first_where_another_failed_by_itself(run: RunFolder) -> None:
    raised(run, 0, 100.0, "RuntimeError", message="[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    killed, by_itself = Ending(2, 3, None, 15, 100.3), Ending(1, 2, 1, None, 100.4)
    assert judged(run, Ending(0, 1, 1, None, 100.2), by_itself, killed).failed_rank == 1
    assert judged(run, Ending(0, 1, 1, None, 100.2), killed).failed_rank == 0


def test_a_rank_that_distui_killed_is_not_the_first_failure(run: RunFolder) -> None:
    outcome = judged(run, Ending(0, 1, 4, None, 100.0), Ending(1, 2, None, 9, 103.0), Ending(2, 3, 0, None, 99.0))
    assert (outcome.failed_rank, outcome.message) == (0, "rank 0: exit status 4")


def test_the_report_has_rank_host_step_traceback_and_log(run: RunFolder) -> None:
    raised(run, 1, 100.0)
    outcome = judged(run, Ending(0, 1, None, 15, 100.5), Ending(1, 2, 1, None, 100.2), Ending(2, 3, None, 15, 100.6))
    lines = failure_report(run, outcome).splitlines()
    assert lines[0] == "error: rank 1 failed on node7, after step 7"
    assert lines[1] == "  Traceback (most recent call last):" and "lines left out" in lines[4]
    assert lines[-3:] == ["  ValueError", f"  log: {run.rank_log(1)}", "  other ranks: ranks 0, 2 ended by distui"]
    assert len(lines) < 20


def test_the_report_of_a_killed_rank_has_its_step_and_last_words(run: RunFolder) -> None:
    ledger = Ledger(run.rank_ledger(1), rank=1, world_size=3, capacity=64, incarnation=1)
    ledger.set_step(41)
    run.rank_log(1).write_text("".join(f"line {number}\n" for number in range(20)))
    assert (last_step(run, 1), last_step(run, 0)) == (41, None)
    outcome = judged(run, Ending(1, 2, None, 9, 100.2))
    told = failure_report(run, outcome)
    assert "after step 41" in told and "killed by SIGKILL: probably the kernel's out-of-memory killer" in told
    assert "line 19" in told and "line 3\n" not in told


def test_the_end_line_says_where_to_look_again(run: RunFolder) -> None:
    outcome = Outcome("finished", 0, "", ranks=[RankOutcome(0, 0)])
    first, second = end_line(run, outcome, 65.0).splitlines()
    assert first == f"distui: finished after 1m 05s; kept in {run.path}"
    assert second == "distui: to look at it again: distui monitor run-1"


def test_the_end_line_says_that_the_folder_is_gone(run: RunFolder) -> None:
    shutil.rmtree(run.path)
    outcome = Outcome("finished", 0, "", ranks=[RankOutcome(0, 0)])
    assert end_line(run, outcome, 65.0) == f"distui: finished after 1m 05s; nothing is kept: {run.path} is gone"


def test_only_the_first_asked_rank_stops_the_job(run: RunFolder) -> None:
    assert not stop_requested(run)
    assert request_stop(run) and not request_stop(run)
    assert stop_requested(run)
