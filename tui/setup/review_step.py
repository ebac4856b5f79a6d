"""Step 5: the file, what changes, what stands against it; then write, or write and launch."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widgets import Button, Input, Static, TabbedContent, TabPane, TextArea

from distui.tui.setup.dialogs import import_text
from distui.tui.setup.model import WizardState
from distui.tui.setup.step import Field, Step

DIFF_STYLES = {"+": "bold #2fbf94", "-": "bold #ff7a59", "@": "dim"}
"""The sign at the line's start says the same without colour."""


class ReviewStep(Step):
    """The only step that writes, and only when a button is pressed."""

    TITLE = "Review"
    HELP = (
        "The file that will be written, and what changes in an existing one: its comments and other settings stay, "
        "and its former text is kept as distui.toml.bak. Problems are what would stop a launch; each has a fix. "
        "Write and launch needs the path of a training script."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    class Decided(Message):
        """A button was pressed."""

        def __init__(self, launch: bool) -> None:
            super().__init__()
            self.launch = launch

    def __init__(self, state: WizardState, scripts: list[str]) -> None:
        super().__init__(state)
        self._scripts = scripts

    def compose(self) -> ComposeResult:
        """Yield script, tabs, problems and buttons."""
        with Horizontal(classes="line"):
            yield Static("Script", classes="label")
            yield Field(
                placeholder="path of a training script; only needed to launch",
                suggester=SuggestFromList(self._scripts) if self._scripts else None,
                id="script",
            )
        yield Static("", id="review-line", classes="sentence", markup=False)
        with TabbedContent(id="review-tabs"):
            with TabPane("File", id="tab-file"):
                yield TextArea("", read_only=True, id="toml", show_cursor=False)
            with TabPane("Changes", id="tab-changes"), VerticalScroll():
                yield Static("", id="diff", markup=False)
            if self.state.imported is not None:
                with TabPane("Import", id="tab-import"), VerticalScroll():
                    yield Static(import_text(self.state.imported), id="import-notes", markup=False)
        with VerticalScroll(id="problems-pane"):
            yield Static("", id="problems", markup=False)
        with Horizontal(classes="buttons"):
            yield Button("Write", id="write", compact=True)
            yield Button("Write and launch", id="launch", compact=True)
            yield Button("Back", id="back", compact=True)

    def enter(self) -> None:
        """Show the file, and put the focus on what Enter should do."""
        if not self.state.script and len(self._scripts) == 1 and self.state.is_this_machine:
            self.state.script = self._scripts[0]
        self.fill(self.query_one("#script", Input), self.state.script)
        self.query_one("#toml", TextArea).text = self.state.toml()
        diff = self.state.diff()
        tabs = self.query_one("#review-tabs", TabbedContent)
        if self.state.existing is None:
            tabs.hide_tab("tab-changes")
            tabs.active = "tab-file"
        else:
            tabs.active = "tab-changes"
            self.query_one("#diff", Static).update(_painted(diff) if diff else "nothing changes")
        self._show()
        problems = self.state.problems()
        can_launch = self.state.launch_problem() is None
        doubtful = problems or (self.state.choice is not None and self.state.choice.fits is False)
        self.query_one("#back" if doubtful else "#launch" if can_launch else "#write", Button).focus()

    def _show(self) -> None:
        what = "a new file" if self.state.existing is None else "changed in place; comments and order stay"
        self.query_one("#review-line", Static).update(
            f"{self.state.path.name} in {self.state.path.absolute().parent}: {what}"
        )
        problems = self.state.problems()
        text = Text()
        for problem in problems:
            text.append(f"✗ {problem.path}: {problem.what}\n", style="bold")
            text.append(f"  why: {problem.why}\n  fix: {problem.fix}\n")
        choice = self.state.choice
        if choice is not None and choice.fits is False:
            text.append(f"! {choice.name} is predicted not to fit: ", style="bold")
            text.append(f"{choice.why}\n")
        stop = self.state.launch_problem()
        if not problems:
            text.append("✓ the settings go together. ")
            if stop is None:
                text.append(f"Launch runs: distui launch {self.state.script}")
            else:
                text.append(f"No launch from here: {stop.what} ({stop.why}); {stop.fix}.")
        self.query_one("#problems", Static).update(text)
        self.query_one("#launch", Button).disabled = stop is not None

    def on_input_changed(self, event: Input.Changed) -> None:
        """Take the script's path."""
        self.heard(event)
        self.state.script = event.value.strip()
        self.tell(None)
        self._show()

    def complete(self) -> bool:
        """Enter in the script's field: go to the button that can be pressed now."""
        trouble = self.state.launch_problem()
        if self.state.script and trouble is not None:
            self.tell(trouble)
            self.query_one("#script", Input).focus()
        else:
            self.query_one("#launch" if trouble is None else "#write", Button).focus()
        return False

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Write, write and launch, or go back."""
        event.stop()
        if event.button.id == "back":
            self.post_message(self.WentBack())
        else:
            self.post_message(self.Decided(event.button.id == "launch"))

    class WentBack(Message):
        """The Back button was pressed."""


def _painted(diff: list[str]) -> Text:
    text = Text()
    for line in diff:
        text.append(line + "\n", style=DIFF_STYLES.get(line[:1], ""))
    return text
