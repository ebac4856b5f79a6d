"""The wizard under a Pilot: forward, back, quit, typed input, wrong input, and how each screen looks."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from textual.widgets import Button, Checkbox, DataTable, Input, OptionList, Static

from distui.core.config.imports.files import import_file
from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.hardware.detect import Cpu, Disk, Hardware, NetworkInterface, parse_hardware
from distui.tui.setup.app import SetupApp, SetupResult
from distui.tui.setup.changes import take_import
from distui.tui.setup.dialogs import HelpScreen, ImportScreen, QuitScreen
from distui.tui.setup.model import WizardState
from tests.tui.setup.driving import app_in, message, type_text

CPU_MACHINE = Hardware(
    name="some CPU, 8 cores",
    nodes=1,
    gpus_per_node=(),
    cpu=Cpu("some CPU", num_cores_physical=8, num_cores_logical=16, num_cores_usable=8, num_numa_nodes=1),
    memory_total_bytes=32 << 30,
    memory_available_bytes=28 << 30,
    disks=(Disk("/home/ada/run", free_bytes=90 << 30, total_bytes=270 << 30, file_system="ext4", is_nvme=False),),
    network=(NetworkInterface("eth0", speed_bits=1e10, is_up=True),),
    software={"python": "3.12.1", "torch": "2.13.0+cpu", "cuda": None, "nccl": None, "driver": None},
)
SMALL, LARGE = (80, 24), (160, 50)
EXISTING = "# the group's settings\n[strategy]\nzero_stage = 1  # as agreed\n\n[monitor]\ntheme = 'nord'\n"
TRAINING = "import distui\nengine = distui.Engine()\n"


async def test_the_default_path_writes_a_working_file(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        for step in range(5):
            assert app.current == step
            assert not (folder / "distui.toml").exists()
            await pilot.press("enter")
    assert app.return_value == SetupResult(folder / "distui.toml", False)
    assert load(folder / "distui.toml", {}, environ={}).config.strategy.zero_stage == 2


async def test_with_one_script_here_the_default_path_launches_in_under_12_keys(folder: Path) -> None:
    (folder / "train.py").write_text(TRAINING)
    app = app_in(folder, CPU_MACHINE)
    num_keys = 0
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        while app.return_value is None and num_keys < 20:
            await pilot.press("enter")
            num_keys += 1
    assert app.return_value == SetupResult(folder / "distui.toml", True, "train.py")
    assert num_keys < 12


async def test_enter_before_the_detection_ends_goes_on_when_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = threading.Event()

    def slow() -> Hardware:
        assert found.wait(120)
        return CPU_MACHINE

    monkeypatch.setattr("distui.tui.setup.hardware_step.detect", slow)
    app = SetupApp(WizardState.open(folder / "distui.toml"))
    async with app.run_test(size=SMALL) as pilot:
        await pilot.press("enter")
        assert app.current == 0 and "detecting" in str(app.screen.query_one("#hardware-rows", Static).content)
        found.set()
        while app.current == 0:  # pytest's timeout ends it
            await pilot.pause(0.01)
        assert app.state.hardware == CPU_MACHINE


async def test_back_keeps_every_answer(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await type_text(pilot, "8xA100-40GB")
        await pilot.press("enter")
        await type_text(pilot, "llama-7")
        await pilot.press("tab")
        await type_text(pilot, "1024")
        await pilot.press("enter", "g", "6", "4", "enter", "down", "enter")
        assert app.current == 3 and app.state.choice is not None
        chosen = app.state.choice
        await pilot.press("4", "enter")
        assert app.current == 4
        await pilot.press("escape")
        assert app.screen.query_one("#field-cluster-nproc Input", Input).value == "4"
        await pilot.press("alt+left")
        assert app.screen.query_one("#global", Input).value == "64"
        table = app.screen.query_one("#plans", DataTable)
        assert str(table.get_row_at(table.cursor_row)[1]) == chosen.name
        await pilot.press("escape")
        assert app.screen.query_one("#sequence-length", Input).value == "1024"
        option = app.screen.query_one("#model-list", OptionList).highlighted_option
        assert option is not None and option.id == "llama-7b"
        await pilot.press("escape")
        assert app.screen.query_one("#hardware-name", Input).value == "8xA100-40GB"
        assert not (folder / "distui.toml").exists()


async def test_a_strategy_with_nvme_asks_for_its_folder_first(folder: Path) -> None:
    disks = tuple(replace(disk, is_nvme=None) for disk in CPU_MACHINE.disks)
    app = SetupApp(WizardState.open(folder / "distui.toml"), hardware=replace(CPU_MACHINE, disks=disks))
    app.state.set_model("350M")
    async with app.run_test(size=SMALL) as pilot:
        await pilot.press("enter", "enter")
        shown = [choice for choice in app.state.choices() if choice.available]
        row = next(row for row, choice in enumerate(shown) if "optimizer on nvme" in choice.name)
        app.screen.query_one("#plans", DataTable).move_cursor(row=row)
        await pilot.press("enter")
        assert app.current == 3
        assert isinstance(app.focused, Input) and app.focused.name == "offload.nvme_path"
        await pilot.press("enter")
        assert app.current == 3 and "not set, and a home is nvme" in message(app)
        await type_text(pilot, str(folder))
        await pilot.press("enter")
        assert app.current == 4
        assert f'nvme_path = "{folder}"' in app.state.toml()


async def test_leaving_asks_only_when_something_was_chosen(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("ctrl+q")
    assert app.return_value == SetupResult(None, False)
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter", "g", "ctrl+q")
        assert isinstance(app.screen, QuitScreen)
        await pilot.press("enter")
        assert not isinstance(app.screen, QuitScreen) and app.current == 1
        await pilot.press("escape", "escape")
        assert isinstance(app.screen, QuitScreen)
        await pilot.press("y")
    assert app.return_value == SetupResult(None, False)
    assert list(folder.iterdir()) == []


async def test_wrong_input_is_told_where_it_is_typed(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await type_text(pilot, "9xB900")
        await pilot.press("enter")
        assert app.current == 0 and "B900" in message(app) and "fix:" in message(app)
        await type_text(pilot, "")
        assert message(app) == ""
        await pilot.press("enter")
        await type_text(pilot, "llama-7x")
        await pilot.press("enter")
        assert app.current == 1 and "llama-7x" in message(app) and "llama-7b" in message(app)
        await pilot.press("backspace", "tab")
        await type_text(pilot, "long")
        assert "'long' is no length" in message(app)
        await pilot.press("enter")
        assert app.current == 1
        await type_text(pilot, "")
        await pilot.press("enter", "m", "x")
        assert app.current == 2 and "'x' is not a whole number above 0" in message(app)
        await pilot.press("tab", "tab", "tab", "tab", "enter")
        assert app.current == 2 and message(app)
        await pilot.press("m", "backspace", "enter", "enter", "0")
        field = app.screen.query_one("#field-cluster-nproc .consequence", Static)
        assert app.current == 3 and "'0' is not" in str(field.content) and field.has_class("wrong")
        await pilot.press("enter")
        assert app.current == 3 and "fix:" in message(app)


async def test_what_cannot_run_yet_is_refused_and_filters_work(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await type_text(pilot, "8xA100-40GB")
        await pilot.press("enter")
        await type_text(pilot, "llama-7b")
        await pilot.press("enter")
        table = app.screen.query_one("#plans", DataTable)
        num_running = table.row_count
        await pilot.press("f")
        assert app.screen.query_one("#fits-only", Checkbox).value
        marks = {str(table.get_row_at(row)[0]) for row in range(table.row_count)}
        assert marks == {"✓"} and table.row_count < num_running
        await pilot.press("f", "r")
        marks = {str(table.get_row_at(row)[0]) for row in range(table.row_count)}
        assert marks == {"✓", "✗", "○"} and table.row_count > num_running
        row = next(row for row in range(table.row_count) if str(table.get_row_at(row)[0]) == "○")
        table.move_cursor(row=row)
        await pilot.press("enter")
        assert app.current == 2 and "cannot run yet" in message(app)


async def test_the_effect_of_the_micro_batch_is_shown_as_it_is_typed(folder: Path) -> None:
    app = SetupApp(WizardState.open(folder / "distui.toml"), hardware=parse_hardware("8xA100-40GB"))
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "llama-7b")
        await pilot.press("enter")
        line = app.screen.query_one("#batch-line", Static)
        before = str(line.content)
        assert before.startswith("Batch as the script has it; with 8 = 1 x 1 x 8 ranks: activations ")
        assert "tokens/s" in before
        await pilot.press("m", "2")
        after = str(line.content)
        assert after.startswith("Batch 16 = 2 x 1 x 8 ranks: activations ")
        assert after.partition("activations")[2] != before.partition("activations")[2]


async def test_a_plan_that_does_not_fit_is_not_launched_by_enter_alone(folder: Path) -> None:
    (folder / "train.py").write_text(TRAINING)
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "llama-2-70b")
        await pilot.press("enter", "enter", "enter")
        assert app.current == 4
        assert "predicted not to fit" in str(app.screen.query_one("#problems", Static).content)
        assert app.screen.focused is app.screen.query_one("#back", Button)
        await pilot.press("enter")
        assert app.current == 3


async def test_an_existing_file_is_resumed_and_merged(folder: Path) -> None:
    (folder / "distui.toml").write_text(EXISTING)
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter", "enter")
        table = app.screen.query_one("#plans", DataTable)
        assert str(table.get_row_at(table.cursor_row)[1]) == "ZeRO-1, fp32"
        await pilot.press("up", "enter", "2", "enter")
        assert "+zero_stage = 3  # as agreed" in str(app.screen.query_one("#diff", Static).content)
        await pilot.press("enter")
    backup = folder / "distui.toml.bak"
    assert app.return_value == SetupResult(folder / "distui.toml", False, "", backup)
    expected = EXISTING.replace("zero_stage = 1", "zero_stage = 3") + "\n[cluster]\nnproc = 2\n"
    assert (folder / "distui.toml").read_text() == expected
    assert backup.read_text() == EXISTING


ACCELERATE = """\
distributed_type: DEEPSPEED
num_processes: 4
mixed_precision: bf16
main_training_function: main
deepspeed_config: {zero_stage: 3, gradient_accumulation_steps: 2, offload_optimizer_device: none}
"""


def imported_state(folder: Path) -> WizardState:
    (folder / "accelerate.yaml").write_text(ACCELERATE)
    state = WizardState.open(folder / "distui.toml")
    take_import(state, import_file(folder / "accelerate.yaml"), "accelerate.yaml")
    return state


async def test_an_imported_file_is_told_of_and_preselected(folder: Path) -> None:
    app = SetupApp(imported_state(folder), hardware=CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        assert isinstance(app.screen, ImportScreen)
        shown = "\n".join(str(part.content) for part in app.screen.query(Static))
        assert "strategy.zero_stage = 3" in shown and "main_training_function: " in shown
        await pilot.press("enter", "enter", "enter")
        table = app.screen.query_one("#plans", DataTable)
        assert str(table.get_row_at(table.cursor_row)[1]) == "ZeRO-3, bf16"
        await pilot.press("enter")
        assert app.screen.query_one("#field-cluster-nproc Input", Input).value == "4"
        await pilot.press("enter")
        assert "main_training_function" in str(app.screen.query_one("#import-notes", Static).content)
        assert not (folder / "distui.toml").exists()
        await pilot.press("enter")
    config = load(folder / "distui.toml", {}, environ={}).config
    assert (config.cluster.nproc, config.strategy.zero_stage, config.precision.dtype) == (4, 3, "bf16")
    assert config.batch.accumulation == 2


async def test_a_file_that_changed_meanwhile_keeps_the_wizard_open(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter", "enter", "enter", "enter")
        (folder / "distui.toml").write_text("# somebody else's\n")
        await pilot.press("enter")
        assert app.current == 4 and "changed meanwhile" in message(app)
    assert (folder / "distui.toml").read_text() == "# somebody else's\n"


async def test_help_is_there_while_typing(folder: Path) -> None:
    app = app_in(folder, CPU_MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("a", "question_mark")
        assert isinstance(app.screen, HelpScreen)
        await pilot.press("escape", "f1")
        assert isinstance(app.screen, HelpScreen)
        await pilot.press("question_mark")
        assert app.screen.query_one("#hardware-name", Input).value == "a"


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "160x50"])
def test_look_of_what_an_import_brought(size: tuple[int, int], folder: Path, snap_compare: Any) -> None:
    app = SetupApp(imported_state(folder), hardware=CPU_MACHINE)
    assert snap_compare(app, terminal_size=size)


KEYS = {
    "hardware": [],
    "model": ["enter"],
    "strategy": ["enter"] * 2,
    "change": ["enter", "enter", "c"],
    "cluster": ["enter"] * 3,
    "review": ["enter"] * 4,
    "wrong": ["enter", "x", "enter"],
    "help": ["enter", "question_mark"],
    "leave": ["enter", "x", "ctrl+q"],
}


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "160x50"])
@pytest.mark.parametrize("step", ["hardware", "model", "strategy", "change", "cluster", "review"])
def test_look_with_gpus_a_model_and_a_file(step: str, size: tuple[int, int], snap_compare: Any) -> None:
    app = still_app(parse_hardware("8xA100-40GB"), "gpt-j-6b", EXISTING)
    assert snap_compare(app, press=KEYS[step], terminal_size=size)


@pytest.mark.parametrize("name", ["hardware", "model", "strategy", "review", "wrong", "help", "leave"])
def test_look_of_the_smallest_screen_without_any_answer(name: str, snap_compare: Any) -> None:
    assert snap_compare(still_app(CPU_MACHINE), press=KEYS[name], terminal_size=SMALL)


def still_app(hardware: Hardware, model: str = "", existing: str | None = None) -> SetupApp:
    """Return the app on a fixed path."""
    base = Config.model_validate(tomlkit.parse(existing).unwrap()) if existing else Config()
    stated = {"strategy.zero_stage", "monitor.theme"} if existing else set()

    state = WizardState(Path("/home/ada/run/distui.toml"), existing, base, stated)
    state.set_model(model)
    return SetupApp(state, hardware=hardware)
