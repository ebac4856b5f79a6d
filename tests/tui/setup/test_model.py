"""What the wizard works out, without a screen."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.errors import UserError
from distui.core.hardware.detect import Cpu, Disk, Hardware, parse_hardware
from distui.tui.setup.consequences import consequence, fastest_nvme, needs_nvme
from distui.tui.setup.model import WizardState
from distui.tui.setup.scripts import find_scripts

CPU_MACHINE = Hardware(
    name="4 cores",
    nodes=1,
    gpus_per_node=(),
    cpu=Cpu("some CPU", num_cores_physical=4, num_cores_logical=8, num_cores_usable=8),
    memory_total_bytes=32 << 30,
    memory_available_bytes=28 << 30,
)
EXISTING = """\
# the group's settings
[strategy]
zero_stage = 1  # as agreed

[batch]
global_size = 16  # of the paper
accumulation = 2

[monitor]
theme = "nord"
"""


def state_of(folder: Path, hardware: Hardware = CPU_MACHINE) -> WizardState:
    state = WizardState.open(folder / "distui.toml")
    state.set_hardware(hardware)
    return state


def test_an_unknown_model_gets_the_safe_stage_and_no_prediction(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    first = state.choices()[0]
    assert (first.values["strategy.zero_stage"], first.plan, first.fits) == (2, None, None)
    assert "n/a" in first.why
    assert state.set_value("cluster.nproc", "1") is None
    assert [choice.values["strategy.zero_stage"] for choice in state.choices()] == [0]


def test_the_written_file_loads_and_has_no_problem(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    state.set_model("gpt2")
    state.choose(next(choice for choice in state.choices() if choice.fits and choice.available))
    assert state.write() is None
    config = load(state.path, {}, environ={}).config
    assert config == state.config()
    assert state.problems() == []
    # What the planner assumes of the batch is no answer of the user's.
    assert config.batch == Config().batch and "[batch]" not in state.path.read_text()


def test_an_existing_file_gives_the_defaults_and_keeps_its_comments(tmp_path: Path) -> None:
    (tmp_path / "distui.toml").write_text(EXISTING)
    state = state_of(tmp_path)
    kept = state.kept()
    assert kept is not None and kept.values["strategy.zero_stage"] == 1
    assert [choice.name for choice in state.choices() if choice.is_like(kept)] == ["ZeRO-1, fp32"]
    state.set_model("gpt2")
    state.choose(next(choice for choice in state.choices() if choice.values["strategy.zero_stage"] == 3))
    assert state.write() == tmp_path / "distui.toml.bak"
    text = state.path.read_text()
    for line in ("# the group's settings", "zero_stage = 3  # as agreed", "global_size = 16  # of the paper"):
        assert line in text
    assert 'theme = "nord"' in text and "accumulation = 2" in text and "micro_size" not in text
    assert (tmp_path / "distui.toml.bak").read_text() == EXISTING
    assert any(line == "+zero_stage = 3  # as agreed" for line in diff_of(EXISTING, text))


def diff_of(before: str, after: str) -> list[str]:
    from distui.core.config.file import diff

    return diff(before, after, "distui.toml")


def test_batch_fields_change_bytes_and_a_cleared_field_leaves_it_to_the_planner(tmp_path: Path) -> None:
    state = state_of(tmp_path, parse_hardware("8xA100-40GB"))
    state.set_model("llama-7b")
    before = {choice.name: choice.plan for choice in state.choices()}
    assert state.set_value("batch.micro_size", "4") is None
    plan = next(choice.plan for choice in state.choices() if choice.name == "ZeRO-3")
    former = before["ZeRO-3"]
    assert plan is not None and former is not None
    assert plan.micro_size == 4 and plan.memory["activations"] == 4 * former.memory["activations"] // former.micro_size
    assert state.set_value("batch.micro_size", "") is None
    assert {choice.name: choice.plan for choice in state.choices()} == before


def test_wrong_values_are_told_and_leave_the_former_ones(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    for key, text in (("cluster.nproc", "many"), ("cluster.nodes", "0"), ("batch.micro_size", "1.5")):
        problem = state.set_value(key, text)
        assert problem is not None and text in problem.what and problem.fix
    assert state.value("cluster.nproc") == "auto" and state.settings == {} and not state.touched
    with pytest.raises(UserError, match="llama-7x"):
        state.set_model("llama-7x")
    assert state.model is None
    length = state.set_sequence_length("long")
    assert length is not None and state.sequence_length is None


def test_a_named_machine_brings_its_nodes_and_cannot_be_launched_on(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    state.set_hardware(parse_hardware("4x8xH100-80GB"), "4x8xH100-80GB")
    assert (state.value("cluster.nodes"), state.world_size) == (4, 32)
    assert [problem.path for problem in state.problems()] == ["cluster.master_port"]
    assert state.set_value("cluster.master_port", "29500") is None
    assert state.problems() == []
    stop = state.launch_problem()
    assert stop is not None and "other hardware" in stop.what
    state.set_hardware(CPU_MACHINE)
    assert state.world_size == 2


def test_consequences_have_the_numbers(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    assert consequence(state, "cluster.nproc").startswith("2 ranks on a node here (no GPU)")
    for key, text in (("cluster.nproc", "9"), ("batch.global_size", "18"), ("batch.micro_size", "2")):
        assert state.set_value(key, text) is None
    assert "9 ranks share 8 cores" in consequence(state, "cluster.nproc")
    assert "batch 18 = 2 x 1 x 9 ranks" in consequence(state, "cluster.nodes")
    assert state.set_value("cluster.nodes", "2") is None
    assert "cannot be divided" in consequence(state, "cluster.nodes")
    assert "cannot find each other" in consequence(state, "cluster.master_addr")
    assert "name one" in consequence(state, "cluster.master_port")


def test_ranks_and_nodes_lead_to_bytes_and_speed_and_an_open_batch_stays_open(tmp_path: Path) -> None:
    state = state_of(tmp_path, parse_hardware("8xA100-40GB"))
    state.set_model("llama-7b")
    state.choose(next(choice for choice in state.choices() if choice.name == "ZeRO-3"))
    assert state.value("batch.global_size") is None
    assert "28.4 GiB of 39.4 GiB a rank, 25." in consequence(state, "cluster.nproc")
    assert "with 2 nodes: " in consequence(state, "cluster.nodes") and "tokens/s" in consequence(state, "cluster.nodes")
    assert state.value("cluster.nodes") == 1, "asking what would be changes nothing"
    assert state.set_value("cluster.nproc", "4") is None
    assert state.value("batch.global_size") is None and not state.problems()
    assert "42.6 GiB of 39.4 GiB a rank, does not fit" in consequence(state, "cluster.nproc")
    state.set_model("")
    assert "size is not known" in consequence(state, "cluster.nproc")


def test_a_folder_for_nvme_is_asked_for_with_its_room_and_rate(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), 900 << 30, 1000 << 30, "xfs", is_nvme=True, read_rate=3.2e9, write_rate=2e9)
    state = state_of(tmp_path, replace(CPU_MACHINE, disks=(disk,)))
    state.set_model("350M")
    assert not needs_nvme(state)
    state.choose(next(choice for choice in state.choices() if choice.name == "ZeRO-3, optimizer on nvme"))
    assert needs_nvme(state) and fastest_nvme(state) == str(tmp_path)
    assert [problem.path for problem in state.problems()] == ["offload.nvme_path"]
    assert "name a folder" in consequence(state, "offload.nvme_path")
    assert state.set_value("offload.nvme_path", str(tmp_path)) is None and not state.problems()
    told = consequence(state, "offload.nvme_path")
    assert "GiB a node go there; 900 GiB free, NVMe, reads 3.2" in told
    assert 'nvme_path = "' in state.toml()
    state.set_hardware(replace(CPU_MACHINE, disks=(replace(disk, is_nvme=False),)))
    assert fastest_nvme(state) is None


def test_only_scripts_that_make_an_engine_are_offered(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import distui\nengine = distui.Engine()\n")
    (tmp_path / "library.py").write_text("from distui.core import config\n")
    (tmp_path / "other.py").write_text("print('Engine()')\n")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "more.py").write_text("from distui import Engine\nEngine(strategy={})\n")
    assert find_scripts(tmp_path) == ["train.py", os.path.join("examples", "more.py")]


def test_launch_needs_a_script_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = state_of(tmp_path)
    for script, words in (("", "no script"), ("train.py", "does not exist"), (".", "is a folder")):
        state.script = script
        problem = state.launch_problem()
        assert problem is not None and words in problem.what
    (tmp_path / "train.py").write_text("")
    state.script = "train.py"
    assert state.launch_problem() is None
