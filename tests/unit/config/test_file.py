"""Editing distui.toml keeps what a person wrote, and no write loses anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from distui.core.config import file as config_file
from distui.core.config.settings import load
from distui.core.errors import UserError

TEXT = """\
# mine
[monitor]
theme = "nord"

[strategy]  # who holds what
zero_stage = 1   # small
# a last word

[batch]
micro_size = 4
accumulation = 2
"""


def test_a_changed_value_keeps_every_other_byte() -> None:
    assert config_file.merge(TEXT, {"strategy.zero_stage": 3}) == TEXT.replace("zero_stage = 1", "zero_stage = 3")


def test_equal_values_and_absent_defaults_change_nothing() -> None:
    assert config_file.merge(TEXT, {"strategy.zero_stage": 1, "strategy.backend": "native", "run.seed": 0}) == TEXT


def test_a_new_key_joins_its_section_and_none_takes_a_key_out() -> None:
    text = config_file.merge(TEXT, {"batch.global_size": 16, "batch.accumulation": None, "precision.dtype": "bf16"})
    assert text == TEXT.replace("accumulation = 2\n", "global_size = 16\n") + '\n[precision]\ndtype = "bf16"\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[strategy]",
        "[strategy]\nzero_stage = 1",
        "strategy.zero_stage = 1\nbatch.micro_size = 2\n",
        "strategy = {zero_stage = 1}\n",
        "[batch]\n[strategy]\n\n\n# end\n",
    ],
)
def test_every_spelling_takes_the_values(text: str) -> None:
    values = {"strategy.zero_stage": 3, "strategy.tensor_parallel": 2, "batch.global_size": 16, "cluster.nproc": 4}
    found = tomlkit.parse(config_file.merge(text, values)).unwrap()
    for key, value in values.items():
        section, _, name = key.partition(".")
        assert found[section][name] == value


def test_a_spelling_that_would_break_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be edited"):
        config_file.merge(
            "[strategy]\nzero_stage = 1\n[strategy.more]\na = 1\n",
            {"strategy.zero_stage": 2, "strategy.backend": "ddp"},
        )
    with pytest.raises(UserError, match="no section"):
        config_file.merge("strategy = 3\n", {"strategy.zero_stage": 2})
    with pytest.raises(UserError, match="not valid TOML"):
        config_file.merge("[strategy\n", {"strategy.zero_stage": 2})
    with pytest.raises(KeyError):
        config_file.merge(None, {"strategy.stage": 2})


@settings(max_examples=40)
@given(
    stage=st.sampled_from([0, 1, 2, 3]),
    micro=st.one_of(st.none(), st.integers(1, 1 << 20)),
    address=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_a_new_file_reads_back_as_it_was_given(stage: int, micro: int | None, address: str) -> None:
    values = {"strategy.zero_stage": stage, "batch.micro_size": micro, "cluster.master_addr": address}
    found = tomlkit.parse(config_file.merge(None, values)).unwrap()
    assert found["strategy"]["zero_stage"] == stage
    assert found["cluster"]["master_addr"] == address
    assert found.get("batch", {}).get("micro_size") == micro


def test_a_new_file_says_what_its_keys_mean_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "distui.toml"
    text = config_file.merge(None, {"strategy.zero_stage": 2})
    assert config_file.write(path, text, expected=None) is None
    assert "# what is sharded over" in path.read_text()
    assert load(path, {}, environ={}).config.strategy.zero_stage == 2


def test_the_former_file_is_kept_and_its_mode_too(tmp_path: Path) -> None:
    path = tmp_path / "distui.toml"
    path.write_text(TEXT)
    path.chmod(0o640)
    backup = config_file.write(path, TEXT + "# more\n", expected=TEXT)
    assert backup == tmp_path / "distui.toml.bak"
    assert (backup.read_text(), path.read_text()) == (TEXT, TEXT + "# more\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["distui.toml", "distui.toml.bak"]


def test_a_link_stays_a_link_and_an_equal_text_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text(TEXT)
    link = tmp_path / "distui.toml"
    link.symlink_to("real.toml")
    assert config_file.write(link, TEXT, expected=TEXT) is None
    config_file.write(link, "# new\n", expected=TEXT)
    assert link.is_symlink() and (tmp_path / "real.toml").read_text() == "# new\n"


def test_a_file_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "distui.toml"
    path.write_text("# somebody else's\n")
    with pytest.raises(UserError, match="changed meanwhile"):
        config_file.write(path, TEXT, expected=None)
    assert path.read_text() == "# somebody else's\n"


def test_paths_that_cannot_be_written_are_refused_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        tmp_path / "absent" / "distui.toml": "mkdir -p",
        tmp_path / "file" / "distui.toml": "--config",
        tmp_path: "name a file",
        Path("/proc/distui.toml"): "folder of your own",
    }
    for path, fix in cases.items():
        with pytest.raises(UserError) as caught:
            config_file.check_writable(path)
        assert fix in caught.value.fix
    assert config_file.read_text(tmp_path / "absent") is None
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        config_file.read_text(tmp_path / "binary")
