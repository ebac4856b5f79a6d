"""`distui config import|export` as commands: what they print, write, and leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.core.config.settings import load
from distui.launcher import cli

THEIRS = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2, "overlap_comm": True}}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(THEIRS))


def test_import_writes_the_file_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "import", "ds.json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "distui.toml").read_text()
    assert "needs no setting:\n  zero_optimization.overlap_comm: it is always so" in captured.err
    config = load(None, {}, environ={}, cwd=tmp_path).config
    assert (config.strategy.zero_stage, config.batch.global_size, config.optimizer.max_grad_norm) == (2, 8, 1.0)
    assert cli.run(["config", "import", "ds.json"]) == 0  # says the same: nothing to do, nothing to refuse


def test_import_into_a_file_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = "# mine\n[strategy]\nzero_stage = 1  # for now\n[run]\nname = 'x'\n"
    (tmp_path / "distui.toml").write_text(before)
    assert cli.run(["config", "import", "ds.json"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "distui.toml").read_text() == before
    assert cli.run(["config", "import", "ds.json", "--merge"]) == 0
    text = (tmp_path / "distui.toml").read_text()
    assert "# mine" in text and "zero_stage = 2  # for now" in text and "name = 'x'" in text
    assert (tmp_path / "distui.toml.bak").read_text() == before


def test_import_that_only_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "import", "ds.json", "--output", "-"]) == 0
    assert "zero_stage = 2" in capsys.readouterr().out
    assert not (tmp_path / "distui.toml").exists()


def test_export_states_the_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    arguments = ["--set", "strategy.zero_stage=3", "--set", "cluster.nproc=2", "--set", "checkpoint.every_steps=5"]
    assert cli.run(["config", "export", "--to", "accelerate", *arguments]) == 0
    captured = capsys.readouterr()
    table = yaml.safe_load(captured.out)
    assert (table["num_processes"], table["deepspeed_config"]["zero_stage"]) == (2, 3)
    assert "checkpoint.every_steps = 5" in captured.err
    assert cli.run(["config", "export", "--to", "deepspeed", "-o", "out.json", *arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["zero_optimization"]["stage"] == 3
