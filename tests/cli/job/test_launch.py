"""`distui launch` with real ranks: what the script sees, what is printed, what is kept, and the exit status."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from distui.core.config.settings import load

ARGUMENTS = ["--help", "--", "-x", "--zero", "9", "a=b c", "", "$$HOME", "${local_rank}", "-m", "ünï✓"]

SCRIPT = """
import json, os, sys
import multiprocessing
print("first line ✓", flush=True)
print("second line, on stderr", file=sys.stderr)
os.write(1, b"third line, from C\\n")
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DISTUI_JOB", "OMP_NUM_THREADS"]
seen = {name: os.environ[name] for name in names}
seen |= {"argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__, "cwd": os.getcwd()}
seen["main"] = sys.modules["__main__"].__dict__ is globals()
seen["torch"] = "torch" in sys.modules
seen["tty"] = sys.stdin.read()
with open(f"{sys.argv[0]}.{seen['RANK']}.json", "w") as file:
    json.dump(seen, file)
"""

MODULE = """
import json, sys, os
with open(f"module.{os.environ['RANK']}.json", "w") as file:
    names = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
    json.dump([sys.argv[1:], sys.path[0], __spec__.name, *map(os.environ.get, names)], file)
sys.exit(0)
"""

FAILING = """
import os, sys, time
def deep(n):
    if n == 0:
        raise ValueError(f"boom on rank {os.environ['RANK']}\\nsecond line")
    deep(n - 1)
print("about to fail")
if os.environ["RANK"] == "1":
    deep(2)
time.sleep(60)
"""

AROUND = {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "0"}

Done = subprocess.CompletedProcess[str]
Jobs = dict[str, Future[Done]]


@pytest.fixture(scope="session")
def jobs(home: Any, distui: Callable[..., Done]) -> Iterator[Jobs]:
    """Run every job of this file, two at a time: each costs its agent's import of torch."""
    home.script("jobs/ok.py", SCRIPT)
    home.script("pack/mod.py", MODULE)
    home.script("jobs/failing.py", FAILING)
    plans = {
        "ok": (["launch", "--nproc", "2", "--set", "cluster.threads_per_rank=3", "jobs/ok.py", *ARGUMENTS], {}),
        "failing": (["launch", "--nproc=2", "--zero=2", "jobs/failing.py"], {}),
        "module": (
            ["launch", "--no-tui", "--nproc", "1", "--set", "run.device=cpu", "-m", "pack.mod", "-m", "--zero"],
            AROUND,
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(distui, *arguments, **environ) for name, (arguments, environ) in plans.items()}


def done(jobs: Jobs, name: str, status: int) -> Done:
    finished = jobs[name].result()
    assert finished.returncode == status, finished.stderr
    return finished


def test_the_script_sees_what_plain_python_would_show_it(jobs: Jobs, home: Any) -> None:
    done(jobs, "ok", 0)
    for rank in range(2):
        seen = json.loads((home.path / f"jobs/ok.py.{rank}.json").read_text())
        assert seen["argv"] == ["jobs/ok.py", *ARGUMENTS]
        assert seen["path0"] == str(home.path / "jobs")
        assert (seen["name"], seen["file"], seen["cwd"]) == ("__main__", "jobs/ok.py", str(home.path))
        assert seen["main"] and not seen["torch"] and seen["tty"] == ""
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert seen["OMP_NUM_THREADS"] == "3"
        assert seen["DISTUI_JOB"] == str(home.run_named("ok").path)


def test_output_of_rank_0_comes_as_it_is_and_ours_goes_to_stderr(jobs: Jobs, home: Any) -> None:
    finished = done(jobs, "ok", 0)
    lines = ["first line ✓", "second line, on stderr", "third line, from C"]
    assert finished.stdout.splitlines() == [lines[0], lines[2]]
    run = home.run_named("ok")
    for rank in range(2):
        assert run.rank_log(rank).read_text(encoding="utf-8").splitlines() == lines
    start, theirs, end, again = finished.stderr.splitlines()
    assert theirs == lines[1]
    assert start == f"distui: run {run.run_id}: 2 ranks, ZeRO-0, fp32; logs in {run.logs}"
    assert end.startswith("distui: finished after ") and end.endswith(f"; kept in {run.path}")
    assert again == f"distui: to look at it again: distui monitor {run.run_id}"


def test_the_run_is_kept(jobs: Jobs, home: Any) -> None:
    done(jobs, "ok", 0)
    run = home.run_named("ok")
    spec = json.loads(run.spec.read_text())
    assert spec["command"] == ["jobs/ok.py", *ARGUMENTS]
    assert (spec["run_id"], spec["name"], spec["world_size"], spec["num_nodes"]) == (run.run_id, "ok", 2, 1)
    config = load(run.config, {}, {}).config
    assert (config.cluster.nproc, config.cluster.threads_per_rank) == (2, 3)
    assert spec["config_toml"] == run.config.read_text()
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["state"], outcome["exit_status"], outcome["failed_rank"]) == ("finished", 0, None)
    assert outcome["ranks"] == [{"rank": rank, "exit_status": 0, "signal": None, "error": ""} for rank in range(2)]
    assert run.path.stat().st_mode & 0o077 == 0


def test_a_module_runs_from_the_working_directory(jobs: Jobs, home: Any) -> None:
    done(jobs, "module", 0)
    arguments, path0, name, threads, gpus = json.loads((home.path / "module.0.json").read_text())
    assert (arguments, path0, name) == (["-m", "--zero"], str(home.path), "pack.mod")
    assert threads == "7"  # the user's own setting wins
    assert gpus == ""  # as run.device=cpu has it


def test_the_failing_rank_is_reported_with_its_own_traceback(jobs: Jobs, home: Any) -> None:
    finished = done(jobs, "failing", 3)
    run = home.run_named("failing")
    report = [line for line in finished.stderr.splitlines()[1:-2] if not line.startswith("distui: rank 1 failed first")]
    assert report[0].startswith("error: rank 1 failed on ")
    text = "\n".join(report)
    assert "Traceback (most recent call last)" in text and "ValueError: boom on rank 1" in text
    assert "runpy" not in text and "launcher/node/rank.py" not in text and "torch" not in text
    assert report[-2:] == [f"  log: {run.rank_log(1)}", "  other ranks: rank 0 ended by distui"]
    assert text.count("boom on rank 1") == 1
    log = run.rank_log(1).read_text()
    assert log.startswith("about to fail\nTraceback") and "runpy" not in log
    kept = json.loads(run.rank_error(1).read_text())
    assert (kept["rank"], kept["type"], kept["message"]) == (1, "ValueError", "boom on rank 1\nsecond line")
    assert not run.rank_error(0).exists()
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["state"], outcome["exit_status"], outcome["failed_rank"]) == ("failed", 3, 1)
    assert outcome["message"] == "rank 1: ValueError: boom on rank 1"
    assert [(rank["exit_status"], rank["signal"]) for rank in outcome["ranks"]] == [(None, 15), (1, None)]


def test_the_agents_words_go_to_the_launchers_log(jobs: Jobs, home: Any) -> None:
    finished = done(jobs, "failing", 3)
    lines = (home.run_named("failing").logs / "launcher.log").read_text().splitlines()
    assert [line.partition(" (pid")[0] for line in lines] == ["rank 1", "rank 0"]
    assert lines[0].endswith("ended with exit status 1") and lines[1].endswith("was ended by SIGTERM")
    assert not any(line in finished.stdout + finished.stderr for line in lines)


def test_a_mistake_starts_nothing(distui: Callable[..., Done], home: Any) -> None:
    finished = distui("launch", "--nproc", "2", "--name", "never", "jobs/nothing.py")
    assert finished.returncode == 2 and "does not exist" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not [run for run in home.runs() if run.run_id.startswith("never")]
