"""The command palette of both apps."""

from __future__ import annotations

from typing import Any

from textual import events
from textual.app import App
from textual.command import CommandList, CommandPalette
from textual.worker import Worker


class Commands(CommandPalette):
    """Textual's palette, whose search may end after it was closed without ending the app."""

    async def on_event(self, event: events.Event) -> None:
        """Handle an event once all parts are there: who types at once is ahead of them."""
        if isinstance(event, events.InputEvent) and not self.query(CommandList):
            return
        await super().on_event(event)

    def run_worker(self, *arguments: Any, **options: Any) -> Worker[Any]:
        """Search; what is searched for in a palette that is gone concerns nobody."""
        return super().run_worker(*arguments, **{**options, "exit_on_error": False})


def open_commands(app: App[Any]) -> None:
    """Open the palette, unless it is open or a question stands above."""
    if not app.screen.is_modal:
        app.push_screen(Commands(id="--command-palette"))
