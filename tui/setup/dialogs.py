"""The wizard's dialogs: what an import brought, help, and whether to leave without writing."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from distui.core.config.imports.carried import Carried
from distui.tui.setup.facts import note_rows

KEYS = """\
Enter        next step (on Review: the highlighted button)
Esc, Alt+←   back, with everything kept
Tab, ↑ ↓     next field, or move in a list
? or F1      this help
Ctrl+P       all commands, by name
Ctrl+Q       leave; asks when something was chosen"""


class HelpScreen(ModalScreen[None]):
    """What this step is for, and the keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q,f1,question_mark", "dismiss", "Close")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """Yield the text in a box."""
        with VerticalScroll(classes="dialog"):
            yield Static(self._title, classes="dialog-title", markup=False)
            yield Static(self._text, markup=False)
            yield Static("\nKeys", classes="dialog-title")
            yield Static(KEYS, markup=False)
            yield Static("\nNothing is written before the last step. Esc closes this.", classes="sentence")


class ImportScreen(ModalScreen[None]):
    """What an imported file brought, and what became of the rest of it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q", "dismiss", "Go on"),
        Binding("down", "scroll(1)", show=False),
        Binding("up", "scroll(-1)", show=False),
        Binding("pagedown", "scroll(10)", show=False),
        Binding("pageup", "scroll(-10)", show=False),
    ]

    def __init__(self, carried: Carried, name: str) -> None:
        super().__init__()
        self._carried, self._name = carried, name

    def compose(self) -> ComposeResult:
        """Yield the notes in a box."""
        with Vertical(classes="dialog notes"):
            yield Static(f"{self._name}, read as {self._carried.source}'s", classes="dialog-title", markup=False)
            with VerticalScroll(can_focus=False):
                yield Static(import_text(self._carried), markup=False)
            yield Static("\nReview shows this again. ↑ ↓ scroll, Enter goes on.", classes="sentence")

    def action_scroll(self, lines: int) -> None:
        """Scroll the notes."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)


def import_text(carried: Carried) -> Text:
    """Return what an import brought, and what became of the other keys, the gravest first."""
    text = Text()
    count = len(carried.values)
    text.append(f"{count} setting{'' if count == 1 else 's'} preselected\n", style="bold")
    for key, value in carried.values.items():
        text.append(f"  {key} = {value}\n")
    for words, reasons in note_rows(carried):
        text.append(f"{words}\n", style="bold")
        for reason in reasons:
            text.append(f"  {reason}\n")
    return text


class QuitScreen(ModalScreen[bool]):
    """Asks whether to leave; True leaves."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "Go on"),
        Binding("y,ctrl+q,ctrl+c", "answer(True)", "Leave"),
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    def compose(self) -> ComposeResult:
        """Yield the question and two buttons."""
        with Vertical(classes="dialog question"):
            yield Static("Leave without writing?", classes="dialog-title")
            yield Static("What you chose here is lost; no file has been touched.")
            with Horizontal(classes="buttons"):
                yield Button("Go on (n)", id="stay", variant="primary", compact=True)
                yield Button("Leave (y)", id="leave", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Take the answer."""
        event.stop()
        self.dismiss(event.button.id == "leave")

    def action_answer(self, answer: bool) -> None:
        """Take the answer from the keyboard."""
        self.dismiss(answer)
