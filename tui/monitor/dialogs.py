"""The help screen and the question before a job is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from distui.tui.monitor.views.base import Key

GLOBAL_KEYS = (
    Key("1 to 8", "the views; a click on their names does the same"),
    Key("p", "pause the picture, or go on; data keeps arriving"),
    Key("← →", "back and forward through the steps (pauses)"),
    Key("w", "steps in sight: all, 1,000, 200, 50"),
    Key("Tab", "the next part of the view"),
    Key("c", "the job: checkpoint, stacks, profile, log level, stop"),
    Key("e  E", "write the table as CSV; the screen as SVG"),
    Key("y  o", "copy the log, or what is wrong; open it in $PAGER"),
    Key("t", "next theme; all of them are in the palette"),
    Key("ctrl+p", "command palette"),
    Key("?", "this help"),
    Key("q", "quit; the job goes on"),
    Key("ctrl+c", "stop the job, after a question; a mere watcher quits"),
)
LIVE_KEYS = ("p", "← →", "c")
"""A recording has none of them, or its own."""
REPLAY_KEYS = (
    Key("space", "play or pause"),
    Key("← →", "back and on by 10 s, at 4x by 40 s"),
    Key("Home End", "to the start, to the end"),
    Key("+ -", "faster, slower: 1x to 64x"),
    Key("% or g", "go to 42%, 1:30, 90s, step 120; or click on the line"),
)


class HelpScreen(ModalScreen[None]):
    """The keys, those of the present view first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter", "close", "Close", key_display="esc")
    ]

    def __init__(self, title: str, keys: tuple[Key, ...], replay: bool = False) -> None:
        super().__init__()
        self._title, self._keys, self._replay = title, keys, replay

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with VerticalScroll(id="help") as box:
            box.border_title = "keys"
            box.border_subtitle = "esc closes"
            if self._keys:
                yield Static(f"{self._title}\n{_table(self._keys)}\n", markup=False)
            if self._replay:
                yield Static(f"recording\n{_table(REPLAY_KEYS)}\n", markup=False)
            everywhere = [key for key in GLOBAL_KEYS if not (self._replay and key.keys in LIVE_KEYS)]
            yield Static(f"everywhere\n{_table(everywhere)}\n", markup=False)
            yield Static("tables\n" + _table(TABLE_KEYS), markup=False)

    def action_close(self) -> None:
        """Go back."""
        self.dismiss(None)


TABLE_KEYS = (
    Key("↑ ↓ j k", "move the cursor; PgUp, PgDn, Home, End too"),
    Key("s  S  r", "sort by the next or previous column; reverse"),
)


def _table(keys: Sequence[Key]) -> str:
    return "\n".join(f"  {key.keys:<14} {key.what}" for key in keys)


class StopScreen(ModalScreen[bool]):
    """Asks whether the job is to be stopped. A second Ctrl-C is a yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Stop the job"),
        Binding("ctrl+c", "answer(True)", "Stop the job", priority=True),
        Binding("n,escape,q,enter", "answer(False)", "Go on", key_display="n"),
    ]

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Vertical(id="stop") as box:
            box.border_title = "stop the job?"
            yield Static(
                "All its ranks end; what is not in a checkpoint is lost.\n\n"
                "  y or ctrl+c   stop the job\n"
                "  n or esc      go on\n\n"
                "To let the job run in the background, press q.",
                markup=False,
            )

    def action_answer(self, answer: bool) -> None:
        """Give the answer."""
        self.dismiss(answer)
