"""An app that shows one widget, and what a reader sees of it."""

from __future__ import annotations

from typing import Any

from textual.app import App, ComposeResult
from textual.widget import Widget


class Stage(App[None]):
    """One widget on the whole screen."""

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self.shown = widget

    def compose(self) -> ComposeResult:
        yield self.shown


def lines(app: App[Any]) -> list[str]:
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]
