"""`distui config show|check|schema`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.core.config.schema import keys
from distui.launcher import cli


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_show_prints_every_value_with_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distui.toml").write_text("[strategy]\nzero_stage = 2\n")
    monkeypatch.setenv("DISTUI_PRECISION_DTYPE", "bf16")
    assert cli.run(["config", "show", "--set", "batch.micro_size=8"]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == list(keys())
    assert rows["strategy.zero_stage"] == ["2", f"file {tmp_path / 'distui.toml'}"]
    assert rows["precision.dtype"] == ["'bf16'", "environment DISTUI_PRECISION_DTYPE"]
    assert rows["batch.micro_size"] == ["8", "command line"]
    assert rows["batch.global_size"] == ["(unset)", "default"]


def test_check_tells_every_problem_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[batch]\nglobal_size = 10\nmicro_size = 4\n[cluster]\nnproc = 2\n[strategy]\nbackend = 'natve'\n")
    assert cli.run(["config", "check", "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert "set batch.global_size to 8 or 16" in told and "write native" in told
    assert cli.run(["config", "check", "--set", "cluster.nproc=2", "--set", "strategy.zero_stage=3"]) == 0
    assert "ZeRO-3, fp32, 2 ranks" in capsys.readouterr().out


def test_schema_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "schema"]) == 0
    shown = capsys.readouterr().out
    for key, field in keys().items():
        assert f"{key}: {field.description}" in shown
    assert "fp32, bf16 or fp16; default 'fp32'; DISTUI_PRECISION_DTYPE" in shown
    assert cli.run(["config", "schema", "--json"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)
