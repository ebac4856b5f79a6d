"""`distui setup` as a process: without a screen, with wrong arguments, and what it leaves on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distui.core.config.check import check
from distui.core.config.settings import load

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "zero_quantised_weights": True},
}


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distui", "setup", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_yes_writes_a_file_that_loads_and_has_no_problem(tmp_path: Path) -> None:
    done = setup(tmp_path, "--yes", "--nproc", "2")
    assert (done.returncode, done.stderr) == (0, "")
    config = load(tmp_path / "distui.toml", {}, environ={}).config
    assert (config.cluster.nproc, config.strategy.zero_stage) == (2, 2)
    assert config.batch.micro_size is None
    assert check(config) == []
    assert "n/a" in done.stdout and "distui launch" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["distui.toml"]


def test_yes_takes_the_best_plan_that_this_version_runs(tmp_path: Path) -> None:
    arguments = ("--model", "llama-7b", "--hardware", "8xA100-40GB", "--global-size", "64", "--config", "a.toml")
    done = setup(tmp_path, "--yes", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    config = load(tmp_path / "a.toml", {}, environ={}).config
    assert config.batch.global_size == 64 and config.precision.dtype == "bf16"
    assert check(config, world_size=8) == []
    assert "tokens/s" in done.stdout and "launch it there" in done.stdout


def test_yes_merges_into_an_existing_file_and_says_what_changed(tmp_path: Path) -> None:
    former = "# ours\n[strategy]\nzero_stage = 1  # as agreed\n"
    (tmp_path / "distui.toml").write_text(former)
    done = setup(tmp_path, "--yes", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "distui.toml").read_text() == former + "\n[cluster]\nnproc = 2\n"
    assert (tmp_path / "distui.toml.bak").read_text() == former
    assert "+nproc = 2" in done.stdout and "distui.toml.bak" in done.stdout
    again = setup(tmp_path, "--yes", "--nproc", "2")
    assert again.returncode == 0 and "stays as it is" in again.stdout


def test_yes_starts_from_a_deepspeed_file_and_says_what_it_left(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    former = "# ours\n[batch]\nglobal_size = 24\n"
    (tmp_path / "distui.toml").write_text(former)
    done = setup(tmp_path, "--yes", "--from", "ds.json", "--model", "gpt2", "--hardware", "8xA100-40GB")
    assert done.returncode == 0, done.stderr
    config = load(tmp_path / "distui.toml", {}, environ={}).config
    assert (config.strategy.zero_stage, config.precision.dtype) == (2, "bf16")
    assert (config.batch.micro_size, config.batch.global_size, config.batch.accumulation) == (4, None, 2)
    assert (config.run.model, config.run.hardware) == ("gpt2", "8xA100-40GB")
    assert (tmp_path / "distui.toml").read_text().startswith("# ours\n")
    assert "not a known key" in done.stderr and "zero_quantised_weights" in done.stderr
    again = setup(tmp_path, "--yes")
    assert again.returncode == 0 and "stays as it is" in again.stdout, again.stderr
    refused = setup(tmp_path, "--yes", "--from", "ds.json", "--model", "llama-2-70b")
    assert refused.returncode == 2 and "as ds.json has it, does not fit" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--yes"),
        (("--yes", "--from", "ds.json"), "cannot read ds.json"),
        (("--yes", "--config", "absent/distui.toml"), "mkdir -p"),
        (("--yes", "--config", "/proc/distui.toml"), "--config"),
        (("--yes", "--model", "llama-7x"), "llama-7b"),
        (("--yes", "--hardware", "8xB900"), "B900"),
        (("--yes", "--nproc", "many"), "'many' is not"),
        (("--yes", "--global-size", "7", "--nproc", "2"), "global_size=7"),
        (("--yes", "--model", "llama-2-70b", "--hardware", "1xT4-16GB"), "does not fit"),
        (("--yes", "--model", "gpt2", "--hardware", "1xT4-16GB", "--nproc", "3"), "3"),
    ],
)
def test_mistakes_are_told_in_three_lines_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = setup(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["error", "why", "fix"]
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_a_broken_file_is_told_with_all_its_problems_and_stays(tmp_path: Path) -> None:
    former = "[strategy]\nzero_stage = 7\nbakend = 'native'\n"
    (tmp_path / "distui.toml").write_text(former)
    done = setup(tmp_path, "--yes")
    assert done.returncode == 2
    assert "strategy.zero_stage" in done.stderr and "strategy.bakend" in done.stderr
    assert (tmp_path / "distui.toml").read_text() == former


def test_the_wizard_loads_no_torch_and_no_daemon() -> None:
    program = (
        "import json, sys, distui.tui.setup.app, distui.launcher.commands.setup;"
        "print(json.dumps(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'grpc')"
        " or name.startswith('distui.daemon'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180, check=True)
    assert json.loads(done.stdout) == []
