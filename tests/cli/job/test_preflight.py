"""What stands against a job is told before any rank starts: exit 2, three lines, and no folder of a run."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from distui.core.hardware.detect import parse_hardware
from distui.core.paths import default_runs_dir
from distui.launcher import cli
from distui.launcher.job import launch, preflight


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(launch, "Job", None)  # a job that is started in spite of it all is a failure
    (tmp_path / "train.py").write_text("raise SystemExit('ran')\n")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(["launch", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == told.count("  why: ") == told.count("  fix: ") == 1, told
    runs = default_runs_dir()
    assert not runs.exists() or list(runs.iterdir()) == []
    return told


def test_missing_script_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "trian.py")
    assert "trian.py does not exist" in told and "fix: write train.py" in told


def test_unreadable_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in refused(capsys, str(tmp_path))
    (tmp_path / "loop.py").symlink_to("loop.py")
    assert "does not exist" in refused(capsys, "loop.py")


def test_modules_are_found_without_being_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "run.py").write_text("")
    preflight.check_target(["-m", "pack.run"], tmp_path)
    assert "pack.runn is neither" in refused(capsys, "-m", "pack.runn")
    assert "pack.run is no package" in refused(capsys, "-m", "pack.run.deeper")
    assert "has no __main__.py" in refused(capsys, "-m", "pack")
    (package / "__main__.py").write_text("")
    preflight.check_target(["-m", "pack"], tmp_path)


def test_unknown_key_and_impossible_combination(capsys: pytest.CaptureFixture[str]) -> None:
    assert "write strategy.zero_stage" in refused(capsys, "--set", "strategy.zero_stag=1", "train.py")
    assert "7 is not 0, 1, 2 or 3" in refused(capsys, "--zero", "7", "train.py")
    told = refused(capsys, "--nproc", "2", "--set", "batch.global_size=10", "--set", "batch.micro_size=4", "train.py")
    assert "set batch.global_size to 8 or 16" in told
    told = refused(capsys, "--nproc", "4", "--set", "strategy.expert_parallel=3", "train.py")
    assert "expert_parallel=3 does not divide the 4 data-parallel ranks" in told
    told = refused(capsys, "--nproc", "2", "--set", "strategy.pipeline_parallel=2", "train.py")
    assert "set batch.accumulation to 2 or more" in told
    told = refused(capsys, "--nproc", "3", "--set", "strategy.tensor_parallel=2", "train.py")
    assert "tensor x pipeline x context = 2 x 1 x 1 = 2; 3 = 1 x 2 + 1" in told
    assert "only the native backend does this" in refused(
        capsys, "--nproc", "2", "--backend", "ddp", "--set", "strategy.tensor_parallel=2", "train.py"
    )


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(capsys, "--nproc", "1", "--master-port", str(port), "train.py")
    assert f"port {port} cannot be opened" in told and "Address already in use" in told
    assert "master_port=0 with 2 nodes" in refused(capsys, "--nproc", "1", "--nodes", "2", "train.py")


def test_a_folder_of_runs_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    told = refused(capsys, "--set", f"run.dir={tmp_path / 'file' / 'runs'}", "train.py")
    assert "cannot be made" in told and "--set run.dir=" in told


def test_a_folder_of_runs_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: False)  # root may write anywhere
    assert "is not writable" in refused(capsys, "train.py")


def test_too_little_disk_space(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 30, used=1012 << 20, free=12 << 20)
    )
    told = refused(capsys, "train.py")
    assert "12.0 MiB free" in told and "at least 64 MiB" in told


def test_more_ranks_than_the_node_carries(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "detect", lambda: parse_hardware("2xA100-40GB"))
    assert "nproc=3 on 2 GPUs" in refused(capsys, "--nproc", "3", "train.py")
    monkeypatch.setattr(launch, "detect", lambda: parse_hardware("2xA100-40GB", host_memory_bytes=400 << 20))
    assert "2 x 250 MiB = 0.5 GiB" in refused(capsys, "--nproc", "2", "train.py")


def test_no_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_find", lambda name, path: None)
    assert "torch is not installed" in refused(capsys, "train.py")


def test_auto_takes_the_gpus_and_divides_the_cores() -> None:
    config = launch.decided(launch.load(None, {}, {}).config, parse_hardware("4xA100-40GB"))
    assert config.cluster.nproc == 4
    assert config.cluster.threads_per_rank >= 1
