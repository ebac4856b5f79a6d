"""The setup wizard: Hardware, Model, Strategy, Cluster, Review. Nothing is written before Review."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Footer, Static

from distui.core.errors import Problem, UserError
from distui.core.hardware.detect import Hardware
from distui.tui.setup.cluster_step import ClusterStep
from distui.tui.setup.dialogs import HelpScreen, ImportScreen, QuitScreen
from distui.tui.setup.hardware_step import HardwareStep
from distui.tui.setup.model import WizardState
from distui.tui.setup.model_step import ModelStep
from distui.tui.setup.review_step import ReviewStep
from distui.tui.setup.scripts import find_scripts
from distui.tui.setup.step import Step
from distui.tui.setup.strategy_step import StrategyStep
from distui.tui.setup.widgets import StepBar
from distui.tui.terminal import TerminalApp, on_terminal
from distui.tui.widgets.commands import open_commands

WIDE = 110
"""Columns from which panes stand side by side."""


@dataclass(frozen=True, slots=True)
class SetupResult:
    """How the wizard ended: the written file, or None where it was left; and what to launch."""

    written: Path | None
    launch: bool
    script: str = ""
    backup: Path | None = None
    """The former file, where there was one that changed."""


class WizardScreen(Screen[None]):
    """Step bar, the current step, what is wrong, and the keys."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012  declared as an instance variable

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self._steps = steps

    def compose(self) -> ComposeResult:
        """Yield the frame around the steps."""
        yield StepBar(tuple(step.TITLE for step in self._steps))
        with ContentSwitcher(initial=self._steps[0].id, id="steps"):
            yield from self._steps
        with VerticalScroll(id="message-pane", can_focus=False):
            yield Static("", id="message", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Start with the first step."""
        self._steps[0].enter()


class SetupApp(TerminalApp[SetupResult]):
    """Turns the pages; the answers are in the state."""

    CSS_PATH = Path(__file__).with_name("setup.tcss")
    TITLE = "distui setup"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("alt+right", "next", "Next", key_display="enter"),
        Binding("escape,alt+left", "back", "Back", key_display="esc"),
        Binding("tab", "app.focus_next", "Field", show=True),
        Binding("f1,question_mark", "help", "Help", key_display="?", priority=True),
        Binding("ctrl+q,ctrl+c", "quit", "Leave", key_display="^q", priority=True),
    ]

    def __init__(self, state: WizardState, *, hardware: Hardware | None = None) -> None:
        """Make the app; `hardware` is this machine where it is known already, else it is detected."""
        super().__init__()
        self.state = state
        self.current = 0
        self.steps: list[Step] = [
            HardwareStep(state, hardware),
            ModelStep(state),
            StrategyStep(state),
            ClusterStep(state),
            ReviewStep(state, find_scripts(Path.cwd())),
        ]

    def get_default_screen(self) -> Screen[None]:
        """Return the wizard's only screen; dialogs stand above it."""
        return WizardScreen(self.steps)

    def on_mount(self) -> None:
        """Show first what an imported file brought."""
        self.set_interval(5.0, self.search_garbage)
        if self.state.imported is not None:
            self.push_screen(ImportScreen(self.state.imported, self.state.import_name))

    def show_step(self, index: int) -> None:
        """Turn to a step and give it the focus."""
        self._tell(None)
        self.current = index
        self.screen_stack[0].query_one("#steps", ContentSwitcher).current = self.steps[index].id
        self.screen_stack[0].query_one(StepBar).current = index
        self.steps[index].enter()

    def on_step_completed(self, event: Step.Completed) -> None:
        """Go on from a step, unless it has been left meanwhile: of two quick Enters the second is for the next page."""
        if self._in_sight(event.step) and self.current + 1 < len(self.steps):
            self.state.touched = self.state.touched or self.current > 0
            self.show_step(self.current + 1)

    def on_step_told(self, event: Step.Told) -> None:
        """Show what the step in sight has to say."""
        if self._in_sight(event.step):
            self._tell(event.trouble)

    def _in_sight(self, step: Step) -> bool:
        # While the app closes there are no screens, and messages still come.
        return bool(self.screen_stack) and step is self.steps[self.current]

    def on_review_step_went_back(self) -> None:
        """Go back from Review by its button."""
        if self._in_sight(self.steps[-1]):
            self.show_step(self.current - 1)

    def on_review_step_decided(self, event: ReviewStep.Decided) -> None:
        """Write the file and leave; what cannot be written is told, and the wizard stays."""
        if not self._in_sight(self.steps[-1]):
            return  # pressed, and gone back before it was heard
        if event.launch and (problem := self.state.launch_problem()):
            self._tell(problem)
            return
        try:
            backup = self.state.write()
        except UserError as error:
            self._tell(error)
            return
        self.exit(SetupResult(self.state.path, event.launch, self.state.script if event.launch else "", backup))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keep the wizard's keys out of its dialogs."""
        if action in ("next", "back", "help", "quit", "command_palette"):
            return isinstance(self.screen, WizardScreen)
        return True

    def action_next(self) -> None:
        """Go to the next step if this one is complete."""
        self.steps[self.current].finish()

    async def action_back(self) -> None:
        """Go to the step before; from the first one, leave."""
        if self.current:
            self.show_step(self.current - 1)
        else:
            await self.action_quit()

    def action_help(self) -> None:
        """Show what this step is for."""
        step = self.steps[self.current]
        self.push_screen(HelpScreen(step.TITLE, step.HELP))

    def action_command_palette(self) -> None:
        """Open the palette."""
        open_commands(self)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Offer the pages' keys and what belongs to all of them."""
        step = self.steps[self.current]
        yield SystemCommand("Next", "Take this page's answers", self.action_next)
        yield SystemCommand("Back", "To the page before; answers stay", self.action_back)
        for binding in step.BINDINGS:
            if isinstance(binding, Binding) and binding.show:
                run = partial(step.run_action, binding.action)
                yield SystemCommand(f"{step.TITLE}: {binding.description}", f"Key {binding.key}", run)
        yield SystemCommand("Help", "What this page is for, and the keys", self.action_help)
        for command in super().get_system_commands(screen):
            if command.title == "Theme":
                yield command
        yield SystemCommand("Leave", "Asks when something was chosen; nothing is written", self.action_quit)

    async def action_quit(self) -> None:
        """Leave without writing; ask first when something was chosen."""
        if self.state.touched:
            self.push_screen(QuitScreen(), self._leave)
        else:
            self._leave(True)

    def _leave(self, answer: bool | None) -> None:
        if answer:
            self.exit(SetupResult(None, False))

    def _tell(self, trouble: UserError | Problem | None) -> None:
        wizard = self.screen_stack[0]
        message = wizard.query_one("#message", Static)
        wizard.query_one("#message-pane").display = trouble is not None
        if trouble is None:
            message.update("")
            return
        text = Text(f"✗ {trouble.what}\n", style="bold")
        text.append(f"  why: {trouble.why}\n  fix: {trouble.fix}", style="not bold")
        message.update(text)


def run_wizard(state: WizardState) -> SetupResult:
    """Run the wizard on a prepared state in this terminal until it is left, and return what it wrote."""
    with on_terminal():
        result = SetupApp(state).run()
    return result if result is not None else SetupResult(None, False)
