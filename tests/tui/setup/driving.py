"""The wizard as its tests drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual import events
from textual.pilot import Pilot
from textual.widgets import Input, Static

from distui.core.hardware.detect import Hardware
from distui.tui.setup.app import SetupApp
from distui.tui.setup.model import WizardState


def app_in(folder: Path, hardware: Hardware) -> SetupApp:
    """Return the wizard that writes into `folder`, on a machine that need not be detected."""
    return SetupApp(WizardState.open(folder / "distui.toml"), hardware=hardware)


async def type_text(pilot: Pilot[Any], text: str) -> None:
    """Replace the focused field's text in one go, as a paste does."""
    field = pilot.app.screen.focused
    assert isinstance(field, Input)
    field.clear()
    field.post_message(events.Paste(text))
    await pilot.pause()


def message(app: SetupApp) -> str:
    """Return what is told at the foot of the page; empty where nothing is."""
    pane = app.screen.query_one("#message-pane")
    return str(app.screen.query_one("#message", Static).content) if pane.display else ""
