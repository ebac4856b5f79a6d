"""What Slurm's environment says, the script that is submitted, and when a job is queued again. Slurm is not needed."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.errors import UserError
from distui.launcher.cluster.allocation import (
    Allocation,
    allocation,
    as_hosts,
    check_tasks,
    counts_of,
    default_ranks,
)
from distui.launcher.cluster.batch import Submission, batch_script, queue_again, submit
from distui.launcher.cluster.submission import seconds_of
from distui.launcher.job.outcome import HOST_LOST, Outcome, RankOutcome
from tests.cluster.conftest import Place

JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu[1-3]", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4"}


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> Path:
    """Put commands on PATH; what each was called with, and its stdin, is kept in the folder that is returned."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    for name, script in commands.items():
        (bin_ / name).write_text(f'#!/bin/bash\necho "$@" >> {bin_}/{name}.called\n{script}\n')
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return bin_


def test_a_job_is_read_from_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = fake(tmp_path, monkeypatch, scontrol="printf 'gpu1\\ngpu2\\ngpu3\\n'")
    assert allocation({}) is None and allocation({"SLURM_JOB_ID": "12"}) is None
    found = allocation({**JOB, "SLURM_RESTART_COUNT": "2"})
    assert found == Allocation("12", ("gpu1", "gpu2", "gpu3"), (8, 8, 4), 2)
    assert (bin_ / "scontrol.called").read_text() == "show hostnames gpu[1-3]\n"
    assert [found.cpus_of(node) for node in ("gpu1", "gpu3", "gpu9")] == [8, 4, None]
    assert allocation({"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu1"}) == Allocation("12", ("gpu1",), ())
    assert as_hosts(found, 0, 8) == "gpu1:8,gpu2:8,gpu3:8" and as_hosts(found, 2, 1) == "gpu1:1,gpu2:1"
    assert as_hosts(found, 4, 1, least=2) == "gpu1:1,gpu2:1,gpu3:1", "Slurm gives what there is: --nodes=2-4"
    for most, least in ((4, 0), (5, 4)):
        with pytest.raises(UserError, match="--nodes 4, and Slurm job 12 has 3"):
            as_hosts(found, most, 1, least)


def test_slurm_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, scontrol="echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(UserError, match="Unable to contact"):
        allocation(JOB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol is not here"):
        allocation(JOB)


def test_counts_and_times_are_slurms() -> None:
    assert counts_of("8(x2),4") == [8, 8, 4] and counts_of("2") == [2] and counts_of("") == [] and counts_of("?") == []
    times = {"90": 5400, "1:30": 90, "4:00:00": 14400, "2-12": 216000, "1-0:30": 88200, "soon": None, "-1": None}
    assert {text: seconds_of(text) for text in times} == times


def test_auto_ranks_are_gpus_then_tasks_then_half_of_the_cpus() -> None:
    job = Allocation("12", ("a", "b"), (8, 6))
    assert default_ranks(job, {"SLURM_NTASKS_PER_NODE": "4"}, 2) == 2
    assert default_ranks(job, {"SLURM_NTASKS_PER_NODE": "4"}, 0) == 4
    assert default_ranks(job, {}, 0) == 3 and default_ranks(Allocation("12", ("a",), (1,)), {}, 0) == 1
    assert default_ranks(Allocation("12", ("a",), ()), {}, 0) is None


def step(whole: int, each: str) -> dict[str, str]:
    return {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(whole), "SLURM_STEP_TASKS_PER_NODE": each}


def test_one_of_several_tasks_does_not_start_the_job_again() -> None:
    check_tasks({"SLURM_NTASKS": "8"}, starts_nodes=True, by_hand=False)  # the batch script itself
    check_tasks(step(1, "1"), starts_nodes=True, by_hand=False)
    check_tasks(step(2, "1(x2)"), starts_nodes=False, by_hand=True)  # srun, one for each node, by hand
    for environ, starts_nodes, by_hand, told in (
        (step(4, "2(x2)"), False, True, "2 times on a node"),
        (step(4, "2(x2)"), True, False, "4 times"),
        (step(2, "1(x2)"), False, False, "env -u SLURM_STEP_ID"),
    ):
        with pytest.raises(UserError) as caught:
            check_tasks(environ, starts_nodes=starts_nodes, by_hand=by_hand)
        assert told in caught.value.report()


def submission(tmp_path: Path, **overrides: str) -> tuple[Submission, Config]:
    asked = {key.replace("__", "."): value for key, value in overrides.items()}
    resolved = load(None, asked, environ={})
    target = ["train me.py", "--text", "a 'b' $HOME"]
    return Submission("train", target, ["--as", "accelerate"], asked, resolved.origins, tmp_path), resolved.config


def test_the_script_runs_the_same_command_and_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked, config = submission(
        tmp_path,
        cluster__nodes="4",
        cluster__starter="slurm",
        cluster__slurm_partition="gpu",
        cluster__slurm_time="4:00:00",
        cluster__slurm_args="--gpus-per-node=8 --comment 'two words'",
    )
    script = batch_script(asked, config)
    first, *options = script.splitlines()[: script.splitlines().index(f"cd {tmp_path} || exit 2")]
    assert first == "#!/bin/bash" and [line.removeprefix("#SBATCH ") for line in options] == [
        "--job-name=train", "--nodes=4", "--ntasks-per-node=1", "--partition=gpu", "--time=4:00:00",
        "--signal=B:USR1@120", "--requeue", "--open-mode=append", "--gpus-per-node=8 --comment 'two words'",
    ]  # fmt: skip
    words = shlex.split(script.splitlines()[-1].replace('"$SLURM_JOB_ID"', "12"))
    assert words[0] == "exec" and words[words.index("distui") :] == [
        "distui", "launch", "--slurm", "--as", "accelerate",
        "--set", "cluster.nodes=4", "--set", "cluster.on_preempt=save", "--set", "checkpoint.resume=always",
        "--set", f"checkpoint.dir={tmp_path}/checkpoints/slurm-12", "train me.py", "--text", "a 'b' $HOME",
    ]  # fmt: skip


def test_what_was_said_is_not_decided_anew(tmp_path: Path) -> None:
    asked, config = submission(
        tmp_path,
        checkpoint__dir=str(tmp_path),
        checkpoint__resume="restart",
        cluster__on_preempt="stop",
        cluster__nodes="4",
        cluster__min_nodes="2",
        cluster__slurm_requeue="false",
    )
    script = batch_script(asked, config)
    assert "--no-requeue" in script and "--nodes=2-4" in script and "--no-kill" in script
    assert "resume=always" not in script and "on_preempt=save" not in script and "SLURM_JOB_ID" not in script
    with pytest.raises(UserError, match="slurm_args"):
        batch_script(*submission(tmp_path, cluster__slurm_args="--comment 'open"))


def test_sbatch_is_given_the_script_and_its_refusal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = fake(tmp_path, monkeypatch, sbatch="cat > $(dirname $0)/taken; echo '17;cluster'")
    assert submit("#!/bin/bash\n", tmp_path) == "17"
    assert (bin_ / "taken").read_text() == "#!/bin/bash\n" and (bin_ / "sbatch.called").read_text() == "--parsable\n"
    fake(tmp_path, monkeypatch, sbatch="cat > /dev/null; echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition"):
        submit("", tmp_path)


GAVE_WAY = Outcome("stopped", 75, "gave way")
LOST = Outcome("failed", 3, "gpu2: its link is down", ranks=[RankOutcome(0), RankOutcome(1, error=HOST_LOST)])
RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"


@pytest.mark.parametrize(
    ("outcome", "state", "told"),
    [
        (GAVE_WAY, RUNNING, "12 is queued again, and"),
        (GAVE_WAY, "JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 BatchFlag=1", "12 is queued again, and"),
        (GAVE_WAY, "JobState=COMPLETING Reason=None Requeue=1 Restarts=0 BatchFlag=1", "not queued again from here"),
        (GAVE_WAY, "JobState=COMPLETING Reason=None Requeue=1 Restarts=1 BatchFlag=1", "queued again by Slurm"),
        (GAVE_WAY, "JobState=RUNNING Reason=None Requeue=0 Restarts=0 BatchFlag=1", "--no-requeue"),
        (GAVE_WAY, "JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=0", ""),
        (LOST, RUNNING, "12 is queued again, and"),
        (Outcome("failed", 3, "rank 0: ValueError"), RUNNING, ""),
        (Outcome("finished", 0, ""), RUNNING, ""),
    ],
)
def test_who_is_queued_again(
    outcome: Outcome, state: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_ = fake(tmp_path, monkeypatch, scontrol=f'[ "$1" = requeue ] || echo "JobId=12 {state}"')
    config = Config.model_validate({"cluster": {"max_restarts": 1}})
    said = queue_again(Allocation("12", ("a", "b"), ()), config, outcome)
    assert told in said if told else said == ""
    called = (bin_ / "scontrol.called").read_text() if (bin_ / "scontrol.called").exists() else ""
    assert ("requeue 12" in called) == (told == "12 is queued again, and")
    config.cluster.slurm_requeue = False
    said = queue_again(Allocation("12", ("a", "b"), ()), config, outcome)
    assert "slurm_requeue is false" in said if outcome in (GAVE_WAY, LOST) else said == ""
    assert queue_again(Allocation("12", ("a", "b"), (), restarts=1), config, LOST) == "", (
        "max_restarts=1 allows no more"
    )


def test_the_command_prints_submits_or_refuses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = fake(place.path, monkeypatch, sbatch="cat > $(dirname $0)/taken; echo 17")
    place.environ["PATH"] = os.environ["PATH"]
    words = ("launch", "--slurm", "--nodes", "2", "--slurm-time", "10", "--set", "cluster.slurm_signal_s=60")
    printed = place.distui(*words, "--dry-run", "steps.py", json.dumps({"out": "x"}))
    assert printed.returncode == 0 and "#SBATCH --time=10" in printed.stdout and not (bin_ / "taken").exists()
    done = place.distui(*words, "steps.py", json.dumps({"out": "x"}))
    assert done.returncode == 0 and done.stdout == "17\n" and "Slurm job 17 is queued" in done.stderr
    assert (bin_ / "taken").read_text() == printed.stdout and not place.runs()
    for more, told in (
        (("--slurm", "--slurm-time", "1"), "a limit of 60 s, and slurm_signal_s=120"),
        (("--slurm", "--slurm-time", "soon"), "'soon' is no time limit"),
        (("--slurm", "--nproc", "3", "--set", "strategy.tensor_parallel=2"), "do not divide the 3 ranks"),
        (("--dry-run",), "--dry-run prints what is submitted"),
    ):
        done = place.distui("launch", *more, "steps.py")
        assert done.returncode == 2 and told in done.stderr, done.stderr
