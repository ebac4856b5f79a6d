"""The wizard under keys that come faster than pages follow, with a planner or a detection that fails; its palette."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.widgets import Checkbox, DataTable, Input

from distui.core.hardware.detect import Hardware, parse_hardware
from distui.tui.setup.app import SetupApp
from distui.tui.setup.model import WizardState
from distui.tui.widgets.commands import Commands
from tests.tui.setup.driving import app_in, message, type_text

MACHINE = parse_hardware("4xA100-40GB")
SMALL = (80, 24)


def press(app: SetupApp, *keys: str) -> None:
    """Send keys as a terminal does: all at once, whatever the app is busy with."""
    for key in keys:
        event = events.Key(key, key if len(key) == 1 else None)
        event.set_sender(app)
        assert app._driver is not None
        app._driver.send_message(event)


async def test_typing_faster_than_the_list_follows_ends_nothing_and_takes_what_was_typed(folder: Path) -> None:
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        press(app, *"7Bx")
        await pilot.pause()
        assert app.current == 1 and app.screen.query_one("#model-name", Input).value == "7Bx"
        await pilot.press("backspace", "enter")
        assert app.current == 2
        assert app.state.model_text == "7B"


async def test_of_two_quick_enters_the_second_does_not_answer_a_page_that_was_not_seen(folder: Path) -> None:
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        field = app.screen.query_one("#hardware-name", Input)
        await field.action_submit()
        await field.action_submit()
        await pilot.pause()
        assert app.current == 1


async def test_a_planner_that_fails_is_told_and_the_wizard_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no ranks")

    monkeypatch.setattr("distui.tui.setup.planning.plan_all", broken)
    monkeypatch.setattr("distui.tui.setup.model.plan_of", broken)
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter")
        await type_text(pilot, "llama-7b")
        await pilot.press("enter")
        assert "the planner failed" in message(app) and "ZeroDivisionError: no ranks" in message(app)
        assert app.screen.query_one("#plans", DataTable).row_count == 4  # the ZeRO stages, without numbers
        await pilot.press("enter")
        assert app.current == 3 and app.state.model_text == "llama-7b"


async def test_a_detection_that_fails_is_told_and_a_machine_can_be_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Hardware:
        raise PermissionError("/sys/class/net is closed")

    monkeypatch.setattr("distui.tui.setup.hardware_step.detect", broken)
    app = SetupApp(WizardState.open(folder / "distui.toml"))
    async with app.run_test(size=SMALL) as pilot:
        while "/sys/class/net is closed" not in message(app):
            await pilot.pause()
        await pilot.press("enter")
        assert app.current == 0 and "type the machine by name" in message(app)
        await type_text(pilot, "8xA100-40GB")
        await pilot.press("enter")
        assert app.current == 1 and message(app) == ""


async def test_the_palette_has_the_pages_commands(folder: Path) -> None:
    app = app_in(folder, MACHINE)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.pause()
        await pilot.press("enter", "enter", "ctrl+p", *"strategy fits", "enter")
        while isinstance(app.screen, Commands):
            await pilot.pause()
        assert app.screen.query_one("#fits-only", Checkbox).value
        await pilot.press("ctrl+p", *"back", "enter")
        while app.current == 2:
            await pilot.pause()
        assert app.current == 1
