"""A calibration from inside the wizard: its rates are used and named; a key leaves it, and no fault ends the app."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware, parse_hardware
from distui.launcher.probes.collectives import run_ranks
from distui.tui.setup.app import SetupApp, SetupResult
from distui.tui.setup.dialogs import CalibrationScreen
from tests.tui.setup.driving import app_in, message, type_text

HERE = replace(parse_hardware("4xA100-40GB"), source="detected", name="this machine")
RATES = {
    "torch": "2.13.0",
    "measured_s": time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1)),
    "compute": {"fp32": [[256.0, 128.0, 5e12]], "bf16": [[256.0, 128.0, 5e12]], "fp16": [[256.0, 128.0, 5e12]]},
    "optimizer_bandwidth": 1e11,
    "collectives": {op: [1e-5, 1e9] for op in ("all_reduce", "all_gather", "reduce_scatter")},
    "pass_bandwidth": 1e11,
    "baseline_bytes": None,
}
Run = Callable[[Hardware, int, Callable[[str], bool]], Hardware]


async def at_strategies(pilot: Pilot[SetupResult], app: SetupApp, run: Run) -> None:
    """Go to the table of strategies."""
    app.state.calibrate = run
    await pilot.pause()
    await pilot.press("enter")
    await type_text(pilot, "llama-7b")
    await pilot.press("enter")
    assert app.current == 2


def why(app: SetupApp) -> str:
    """Return what the pane says of the highlighted strategy."""
    return " ".join(str(part) for part in app.screen_stack[0].query_one("#why", Static).content.renderables)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_the_measured_rates_are_used_and_named(folder: Path, size: tuple[int, int]) -> None:
    asked, go_on = [], threading.Event()

    def measure(hardware: Hardware, num_ranks: int, watch: Callable[[str], bool]) -> Hardware:
        asked.append((hardware.name, num_ranks, watch("2 of 5: collectives")))
        assert go_on.wait(60)
        return replace(hardware, calibration={str(num_ranks): RATES})

    app = app_in(folder, HERE)
    async with app.run_test(size=size) as pilot:
        await at_strategies(pilot, app, measure)
        assert "not measured; k does it" in why(app)
        speeds = [choice.plan.tokens_per_s for choice in app.state.choices() if choice.plan]
        await pilot.press("k")
        assert isinstance(app.screen, CalibrationScreen)
        while "2 of 5: collectives" not in str(app.screen.query_one("#calibration-words", Static).content):
            await pilot.pause()
        go_on.set()
        while isinstance(app.screen, CalibrationScreen):
            await pilot.pause()
        assert asked == [("this machine", 4, True)]
        assert "Rates measured here" in why(app) and "2026-05-04, 4 ranks, torch 2.13.0" in why(app)
        assert [choice.plan.tokens_per_s for choice in app.state.choices() if choice.plan] != speeds
        await pilot.press("escape", "escape", "enter", "enter")  # to Hardware and back: they stay
        assert app.current == 2 and "Rates measured here" in why(app)


async def test_escape_ends_the_ranks_and_nothing_changes(folder: Path) -> None:
    ended = threading.Event()

    def measure(hardware: Hardware, num_ranks: int, watch: Callable[[str], bool]) -> Hardware:
        while watch("1 of 5: memory beyond tensors"):
            ended.wait(0.01)
        ended.set()
        raise UserError("the measurement was ended", "somebody left it", "start it again")

    app = app_in(folder, HERE)
    async with app.run_test(size=(80, 24)) as pilot:
        await at_strategies(pilot, app, measure)
        await pilot.press("k", "escape")
        while not ended.is_set() or isinstance(app.screen, CalibrationScreen):
            await pilot.pause()
        assert message(app) == "" and "not measured" in why(app) and app.state.measured is None
        assert app.screen.query_one("#plans", DataTable).row_count


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("rank 1 of the measurement ended with status 1", "no memory", "fewer ranks"), "no memory"),
        (ZeroDivisionError("a fault"), "ZeroDivisionError: a fault"),
    ],
)
async def test_what_fails_is_told_and_the_wizard_stays(folder: Path, error: Exception, told: str) -> None:
    def measure(hardware: Hardware, num_ranks: int, watch: Callable[[str], bool]) -> Hardware:
        raise error

    app = app_in(folder, HERE)
    async with app.run_test(size=(80, 24)) as pilot:
        await at_strategies(pilot, app, measure)
        await pilot.press("k")
        while told not in message(app):
            await pilot.pause()
        await pilot.press("enter")
        assert app.current == 3


async def test_a_machine_that_is_only_named_is_not_measured(folder: Path) -> None:
    def measure(hardware: Hardware, num_ranks: int, watch: Callable[[str], bool]) -> Hardware:
        raise AssertionError("it is another machine")

    app = app_in(folder, HERE)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        await type_text(pilot, "8xH100-80GB")
        await at_strategies(pilot, app, measure)
        await pilot.press("k")
        assert "only this machine can be measured" in message(app)


def test_a_measurement_that_is_left_ends_its_ranks() -> None:
    heard: list[str] = []

    def leave(line: str) -> bool:
        heard.append(line)
        return False

    with pytest.raises(UserError, match="was ended"):
        run_ranks("distui.launcher.probes.calibrate_bench", 2, {}, watch=leave)
    assert heard == [""]
