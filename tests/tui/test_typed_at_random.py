"""Both apps under random keys and resizes on each of their screens, faster than they are handled: none ends an app."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from textual import events
from textual.app import App
from textual.keys import _character_to_key
from textual.pilot import Pilot

from distui.core.config.imports.files import import_file
from distui.core.hardware.detect import parse_hardware
from distui.tui.monitor.app import VIEWS
from distui.tui.setup.app import SetupApp
from distui.tui.setup.changes import take_import
from distui.tui.setup.model import WizardState
from tests.tui.watching import known, until, watching

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon

NUM_KEYS = 200
TYPED = "0123456789abcdefghijklmnopqrstuvwxyzESM .,:/[]()*+?%-_=\\"
WORDS = ("7B", "7Bx", "350M", "llama-", "8xA100-40GB", "train.py:f", "a.json", "999999999999", "-1", "step 9", "(")
"""Pieces of what the fields take, so that some of it is complete for a moment."""
NAMED = ("enter", "tab", "shift+tab", "escape", "up", "down", "left", "right", "pageup", "pagedown", "home", "end")
EDITING = ("backspace", "delete", "alt+left", "alt+right", "f1", "ctrl+p", "space", "ctrl+w", "ctrl+u")
SIZES = ((80, 24), (160, 50), (40, 10), (20, 5), (200, 12), (81, 60), (1, 1))
HARDWARE = parse_hardware("2xA100-40GB")


def press(app: App[Any], *keys: str) -> None:
    """Send keys as a terminal does: all at once, whatever the app is busy with."""
    for key in keys:
        character = key if len(key) == 1 else {"space": " "}.get(key)
        event = events.Key(_character_to_key(key) if len(key) == 1 else key, character)
        event.set_sender(app)
        assert app._driver is not None
        app._driver.send_message(event)


async def storm(app: App[Any], pilot: Pilot[Any], rng: random.Random, num_keys: int) -> int:
    """Type and resize until `num_keys` are typed or the app has been left; return how many were typed."""
    typed = 0
    while typed < num_keys and app.is_running and app.return_code is None:
        burst: list[str] = []
        while len(burst) < rng.randint(1, 16):
            kind = rng.random()
            burst += (
                rng.choice(WORDS) if kind < 0.2 else rng.choice(TYPED) if kind < 0.7 else [rng.choice(NAMED + EDITING)]
            )
        press(app, *burst)
        typed += len(burst)
        if rng.random() < 0.3:
            await pilot.resize_terminal(*rng.choice(SIZES))
        await pilot.pause()
    return typed


def in_steps(num_keys: int) -> tuple[Any, ...]:
    """Return keys a screen: few, so that all screens are in each run, and under `-m fuzz` all of them."""
    return (pytest.param(num_keys, id="some"), pytest.param(NUM_KEYS, id="all", marks=pytest.mark.fuzz))


WIZARD: dict[str, tuple[int | str, ...]] = {
    "hardware": (0,),
    "model": (1,),
    "strategy": (2,),
    "cluster": (3,),
    "review": (4,),
    "help": (1, "f1"),
    "change": (2, "c"),
    "leave": (3, "ctrl+q"),
}


@pytest.mark.parametrize("num_keys", in_steps(NUM_KEYS // len(WIZARD)))
async def test_no_keys_end_the_wizard(num_keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": 32, "no_such_key": 1}')
    rng, left = random.Random(7), dict.fromkeys(WIZARD, num_keys)
    while left:
        state = WizardState.open(tmp_path / "distui.toml")
        take_import(state, import_file(tmp_path / "ds.json"), "ds.json")
        app = SetupApp(state, hardware=HARDWARE)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            await storm(app, pilot, rng, 8)  # above the first step is what the import brought
            while left and app.is_running and app.return_code is None:
                screen, num_left = next(iter(left.items()))
                step, *keys = WIZARD[screen]
                while len(app.screen_stack) > 1:
                    app.pop_screen()
                if app.state.hardware is None or app.state.choice is None:
                    app.state.settings.clear()  # what was typed so far may not go together
                    app.state.set_hardware(HARDWARE)
                    app.state.set_model("llama-7b")
                    app.state.choose(app.state.choices()[0])
                app.show_step(int(step))
                press(app, *map(str, keys))
                left[screen] -= await storm(app, pilot, rng, num_left)
                if left[screen] <= 0:
                    del left[screen]
        # An exception of a handler is raised by `run_test`.


SCREENS: dict[str, tuple[str, ...]] = {view.TITLE.lower(): (str(number),) for number, view in enumerate(VIEWS, 1)}
SCREENS |= {"rank": ("2", "enter"), "help": ("?",), "control": ("c",), "stop": ("c", "x"), "replies": ("c", "s")}


@pytest.mark.parametrize("num_keys", in_steps(NUM_KEYS // len(SCREENS)))
async def test_no_keys_end_the_dashboard(
    num_keys: int, daemon: FakeDaemon, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    daemon.send(sample.sample_update())
    rng, left = random.Random(7), dict.fromkeys(SCREENS, num_keys)
    while left:
        app = watching(daemon, sample)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, known(app))
            while left and app.is_running and app.return_code is None:
                screen, num_left = next(iter(left.items()))
                while len(app.screen_stack) > 1:
                    app.pop_screen()
                press(app, *SCREENS[screen])
                left[screen] -= await storm(app, pilot, rng, num_left)
                if left[screen] <= 0:
                    del left[screen]
