"""The wizard's dialogs: what an import brought, help, a calibration, and whether to leave without writing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, LoadingIndicator, Static

from distui.core.config.imports.carried import Carried
from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware
from distui.core.plan.measured import Measured
from distui.tui.setup.facts import note_rows
from distui.tui.setup.failures import told_as

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


Calibrate = Callable[[Hardware, int, Callable[[str], bool]], Hardware]
"""Measures a machine with so many ranks; tells what it does, and ends where that returns False."""


class CalibrationScreen(ModalScreen[Hardware | UserError | None]):
    """Runs the calibration in a thread; gives the machine with its rates, why there are none, or None where left."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "Cancel")]

    class Told(Message):
        """What the calibration does now."""

        def __init__(self, words: str) -> None:
            super().__init__()
            self.words = words

    class Ended(Message):
        """It has ended."""

        def __init__(self, result: Hardware | UserError) -> None:
            super().__init__()
            self.result = result

    def __init__(self, run: Calibrate, hardware: Hardware, num_ranks: int) -> None:
        super().__init__()
        self._measure, self._hardware, self._num_ranks = run, hardware, num_ranks
        self._left = threading.Event()
        self._began_s = time.monotonic()
        self._words = "starting the ranks"

    def compose(self) -> ComposeResult:
        """Yield what is measured and how to leave."""
        ranks = "1 rank trains" if self._num_ranks == 1 else f"{self._num_ranks} ranks train"
        with Vertical(classes="dialog"):
            yield Static("Calibration of this machine", classes="dialog-title")
            yield Static(
                f"{ranks} for up to a minute, longer on a busy machine; the rates are kept for all plans here."
            )
            yield LoadingIndicator(classes="calibrating")
            yield Static("", id="calibration-words", markup=False)
            yield Static("\nEsc ends it; nothing is kept then.", classes="sentence")

    def on_mount(self) -> None:
        """Begin."""
        self._show()
        self.set_interval(1.0, self._show)
        self._run_it()

    def on_unmount(self) -> None:
        """End the ranks, however this screen goes away."""
        self._left.set()

    @work(thread=True, exclusive=True)
    def _run_it(self) -> None:
        result: Hardware | UserError
        try:
            with told_as("the calibration", "go on without it: rates that are not measured are n/a or assumed"):
                result = self._measure(self._hardware, self._num_ranks, self._watch)
        except UserError as error:
            result = error
        if not self._left.is_set():
            self.post_message(self.Ended(result))

    def _watch(self, words: str) -> bool:
        if self._left.is_set():
            return False
        if words and words != self._words:
            self.post_message(self.Told(words))
        return True

    def _show(self) -> None:
        seconds = time.monotonic() - self._began_s
        self.query_one("#calibration-words", Static).update(f"{self._words} ... {seconds:.0f} s")

    def on_calibration_screen_told(self, event: Told) -> None:
        """Show what is measured."""
        event.stop()
        self._words = event.words
        self._show()

    def on_calibration_screen_ended(self, event: Ended) -> None:
        """Give what came of it, unless it was left meanwhile."""
        event.stop()
        if not self._left.is_set():
            self._left.set()
            self.dismiss(event.result)

    def action_leave(self) -> None:
        """Leave it."""
        if not self._left.is_set():
            self._left.set()
            self.dismiss(None)


def rates_words(hardware: Hardware, num_ranks: int, can_measure: bool) -> str:
    """Return where the predicted speeds come from; empty for another machine than this one."""
    if hardware.source != "detected":
        return ""
    measured = Measured.of(hardware.calibration, num_ranks)
    if measured is not None:
        return f"Rates {measured.origin}."
    return "Rates of this machine are not measured" + ("; k does it, in up to a minute." if can_measure else ".")
