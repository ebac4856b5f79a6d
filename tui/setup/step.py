"""What the five steps have in common."""

from __future__ import annotations

from typing import ClassVar

from textual.containers import Vertical
from textual.message import Message
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input

from distui.core.errors import Problem, UserError
from distui.tui.setup.model import WizardState


class Step(Vertical):
    """One page of the wizard. It reads and changes the state; the app turns the pages."""

    TITLE: ClassVar[str] = ""
    HELP: ClassVar[str] = ""

    class Completed(Message):
        """The step's answers are taken: on to the next one."""

        def __init__(self, step: Step) -> None:
            super().__init__()
            self.step = step

    class Told(Message):
        """Something to show below the step: what is wrong, or nothing."""

        def __init__(self, step: Step, trouble: UserError | Problem | None) -> None:
            super().__init__()
            self.step, self.trouble = step, trouble

    def __init__(self, state: WizardState) -> None:
        super().__init__(id=self.TITLE.lower(), classes="step")
        self.state = state
        self.typed: dict[str, str] = {}
        """What each field's messages have told. A field itself may be ahead of them when somebody types fast."""

    def enter(self) -> None:
        """Show the state and take the focus; called each time the page is turned to."""
        raise NotImplementedError

    def complete(self) -> bool:
        """Put the page's answers into the state and return whether the wizard can go on; tell what is wrong."""
        return True

    def finish(self) -> None:
        """Take the answers as they are now, and ask for the next page if nothing is wrong with them."""
        if self.complete():
            self.post_message(self.Completed(self))

    def heard(self, event: Input.Changed) -> str:
        """Take a field's message; return the field's name."""
        event.stop()
        name = name_of(event.input)
        self.typed[name] = event.value
        return name

    def fill(self, field: Input, text: str) -> None:
        """Set a field without the message that typing sends."""
        self.typed[name_of(field)] = text
        if field.value != text:
            with field.prevent(Input.Changed):
                field.value = text
            field.cursor_position = len(text)

    def tell(self, trouble: UserError | Problem | None) -> None:
        """Show what is wrong below the step; None clears it."""
        self.post_message(self.Told(self, trouble))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take Enter in any field as `next`."""
        event.stop()
        self.finish()


class Field(Input):
    """A one-line input that leaves `?` to the help."""

    def __init__(
        self,
        *,
        placeholder: str = "",
        suggester: Suggester | None = None,
        name: str | None = None,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(placeholder=placeholder, suggester=suggester, name=name, id=id, classes=classes, compact=True)

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Take every printable key but `?`, which is the app's."""
        return key != "question_mark" and super().check_consume_key(key, character)


def name_of(field: Input) -> str:
    """Return what a step calls the field."""
    return field.id or field.name or ""


def pass_scroll(target: Widget, lines: int) -> None:
    """Scroll a pane that has not the focus by `lines`; pages are `lines` times its height."""
    target.scroll_relative(y=lines, animate=False)
