"""The wizard's strategy changed by hand, and a script's own model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from textual.widgets import DataTable

from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.errors import UserError
from distui.core.hardware.detect import parse_hardware
from distui.core.plan.models import load_model
from distui.core.plan.types import ModelSpec
from distui.tui.setup.tune import TuneField
from tests.tui.setup.driving import app_in, message, type_text

MACHINE = parse_hardware("8xA100-40GB")
SMALL = (80, 24)


async def test_a_strategy_is_changed_by_hand_with_the_effect_of_every_value(folder: Path) -> None:
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "gpt2")
        await pilot.press("enter", "c")
        fields = {field.key: field for field in app.screen.query(TuneField)}
        before = str(fields["batch.micro_size"].content)
        for field in fields.values():
            words = str(field.content)
            assert words.count("GiB") == len(field.values()) and "/s" in words
        await pilot.press("left", "left", "left", "right", "down", "down", "down", "down", "right", "down", "right")
        assert fields["strategy.zero_stage"].chosen == 1 and str(fields["batch.micro_size"].content) != before
        micro = fields["batch.micro_size"].chosen
        await pilot.press("down", "right", "right", "enter")
        table = app.screen.query_one("#plans", DataTable)
        assert str(table.get_row_at(table.cursor_row)[1]) == "ZeRO-1, selective checkpointing"
        await pilot.press("c", "right", "escape", "enter", "enter", "enter")
    config = load(folder / "distui.toml", {}, environ={}).config
    assert (config.strategy.zero_stage, config.activation_checkpointing.mode) == (1, "selective")
    assert (config.batch.micro_size, config.batch.global_size) == (micro, micro * 4 * 8)


async def test_a_change_of_the_stage_alone_leaves_the_batch_to_the_script(folder: Path) -> None:
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "gpt2")
        await pilot.press("enter", "c", "left", "enter", "enter", "enter", "enter")
    config = load(folder / "distui.toml", {}, environ={}).config
    assert config.batch == Config().batch


async def test_a_scripts_own_model_is_built_beside_the_screen(folder: Path) -> None:
    def build(text: str) -> ModelSpec:
        if text.endswith(":absent"):
            raise UserError(f"{text} is not there", "no such function", "name another")
        return replace(load_model("gpt2"), name="mine", source=text)

    app = app_in(folder, MACHINE)
    app.state.models.build_script = build
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "train.py:absent")
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert app.current == 1 and "train.py:absent is not there" in message(app)
        await type_text(pilot, "train.py:build")
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert app.current == 2 and app.state.model is not None and app.state.model.name == "mine"
        await pilot.press("enter", "enter", "enter")
    run = load(folder / "distui.toml", {}, environ={}).config.run
    assert run.model == "train.py:build"
