"""Precedence, origins, and that every problem of the settings is told at once with a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from distui.core.config.schema import Config, keys
from distui.core.config.settings import accepts, env_name, load, parse_text, to_toml
from distui.core.errors import ConfigError, Problem, UserError


def problems_of(file: Path | None, overrides: dict[str, str], environ: dict[str, str]) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides, environ)
    return {problem.path: problem for problem in caught.value.problems}


def write(folder: Path, text: str) -> Path:
    path = folder / "distui.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, '[strategy]\nzero_stage = 1\n[precision]\ndtype = "fp16"\n[run]\nname = "from file"\n')
    environ = {"DISTUI_STRATEGY_ZERO_STAGE": "2", "DISTUI_PRECISION_DTYPE": "bf16"}
    resolved = load(file, {"strategy.zero_stage": "3"}, environ)
    assert resolved.config.strategy.zero_stage == 3
    assert resolved.config.precision.dtype == "bf16"
    assert resolved.config.run.name == "from file"
    assert resolved.config.batch.global_size is None
    assert resolved.origins["strategy.zero_stage"] == "command line"
    assert resolved.origins["precision.dtype"] == "environment DISTUI_PRECISION_DTYPE"
    assert resolved.origins["run.name"] == f"file {file}"
    assert resolved.origins["batch.global_size"] == "default"


def test_the_file_of_the_working_directory_is_found(tmp_path: Path) -> None:
    assert load(None, {}, {}, cwd=tmp_path).path is None
    file = write(tmp_path, "[strategy]\nzero_stage = 2\n")
    resolved = load(None, {}, {}, cwd=tmp_path)
    assert (resolved.path, resolved.config.strategy.zero_stage) == (file, 2)


def test_text_becomes_what_the_field_is() -> None:
    overrides = {
        "cluster.nproc": "4",
        "telemetry.enabled": "off",
        "telemetry.flush_s": "0.25",
        "batch.micro_size": "8",
        "run.name": "007",
        "precision.initial_loss_scale": "1_024",
    }
    config = load(None, overrides, {}).config
    assert (config.cluster.nproc, config.telemetry.enabled, config.telemetry.flush_s) == (4, False, 0.25)
    assert (config.batch.micro_size, config.run.name, config.precision.initial_loss_scale) == (8, "007", 1024.0)
    assert load(None, {"cluster.nproc": "auto", "batch.micro_size": "none"}, {}).config == Config()


def test_all_problems_come_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'seed = 1\n[strategy]\nzero_stag = 1\n[strateg]\na = 1\n[cluster]\nnproc = "autu"\n[batch]\nglobal_size = -1\n',
    )
    found = problems_of(
        file,
        {"precision.dtype": "bf15", "zero_stage": "1", "compression.gradients": "int7"},
        {"DISTUI_STRATEGY_ZERO": "1", "DISTUI_STRATGY_ZERO_STAGE": "1"},
    )
    assert found["seed"].fix == "write it as run.seed"
    assert found["strategy.zero_stag"].fix == "write strategy.zero_stage"
    assert found["strateg"].fix == "write strategy"
    assert found["zero_stage"].fix == "write strategy.zero_stage"
    assert "did you mean auto" in found["cluster.nproc"].fix
    assert found["batch.global_size"].what == "-1 is not a whole number above 0"
    assert "did you mean bf16" in found["precision.dtype"].fix
    assert "fp32, bf16 or fp16" in found["precision.dtype"].what
    assert "none, onebit, int8 or fp8" in found["compression.gradients"].fix
    assert "DISTUI_STRATEGY_ZERO_STAGE" in found["DISTUI_STRATEGY_ZERO"].fix
    assert "DISTUI_STRATEGY_ZERO_STAGE" in found["DISTUI_STRATGY_ZERO_STAGE"].fix
    assert len(found) == 10
    report = ConfigError(list(found.values())).report()
    assert report.count("error: ") == report.count("  why: ") == report.count("  fix: ") == 10


def test_variables_of_ours_that_are_no_settings_are_left_alone() -> None:
    environ = {"DISTUI_STATE_DIR": "/x", "DISTUI_RUNTIME_DIR": "/y", "DISTUI_NO_TUI": "1", "DISTUI_JOB": "/z"}
    assert load(None, {}, {**environ, "OTHER_STRATEGY_ZERO_STAGE": "9"}).config == Config()


def test_a_wrong_type_in_the_file_says_what_is_taken(tmp_path: Path) -> None:
    file = write(tmp_path, '[strategy]\nzero_stage = "2"\n[telemetry]\nenabled = 3\n')
    found = problems_of(file, {}, {})
    assert found["strategy.zero_stage"].what == "'2' is not 0, 1, 2 or 3"
    assert found["telemetry.enabled"].what == "3 is not true or false"


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path, "[run]\nname = unquoted\n"), {}, {})
    ((path, problem),) = found.items()
    assert path.endswith("distui.toml:2") and "name = unquoted" in problem.why


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml"):
        load(tmp_path / "nothing.toml", {}, {})


def test_every_key_has_words_and_a_variable_that_reads_its_default() -> None:
    for key, field in keys().items():
        assert accepts(field), key
        text = "none" if field.default is None else str(field.default)
        resolved = load(None, {}, {env_name(key): text})
        assert resolved.config == Config(), key
        assert resolved.origins[key] == f"environment {env_name(key)}"
        assert parse_text(field, text) == field.default


def test_the_written_toml_reads_back_the_same(tmp_path: Path) -> None:
    overrides = {
        "cluster.nproc": "3",
        "batch.global_size": "12",
        "run.name": 'quo"te ünï',
        "telemetry.flush_s": "0.125",
    }
    config = load(None, overrides, {}).config
    for comments in (False, True):
        again = load(write(tmp_path, to_toml(config, comments=comments)), {}, {})
        assert again.config == config
    assert "# micro_size is unset" in to_toml(config)
