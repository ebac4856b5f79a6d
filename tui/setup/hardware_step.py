"""Step 1: what this machine has, or another one by name."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware, detect, parse_hardware
from distui.tui.setup.facts import grid, hardware_rows
from distui.tui.setup.failures import told_as
from distui.tui.setup.model import WizardState
from distui.tui.setup.step import Field, Step, pass_scroll

EXAMPLES = ("8xA100-40GB", "8xA100-80GB", "8xH100-80GB", "4x8xH100-80GB", "8xH200-141GB", "1xRTX4090-24GB")


class HardwareStep(Step):
    """Detects in a thread, so that the screen is there at once."""

    TITLE = "Hardware"
    HELP = (
        "What the plan is made for. Leave the field empty for this machine, or type a machine by name: 8xA100-40GB is "
        "one node with eight GPUs, 4x8xH100-80GB four nodes of eight. A named machine's facts come from datasheets; "
        "what no datasheet tells is n/a. A file planned for another machine is written here and launched there."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "scroll(-1)", show=False),
        Binding("down", "scroll(1)", show=False),
        Binding("pageup", "scroll(-10)", show=False),
        Binding("pagedown", "scroll(10)", show=False),
    ]

    class Detected(Message):
        """The detection has ended."""

        def __init__(self, hardware: Hardware | UserError) -> None:
            super().__init__()
            self.hardware = hardware
            """What was found, or why nothing was."""

    def __init__(self, state: WizardState, known: Hardware | None = None) -> None:
        super().__init__(state)
        self._here = known
        """This machine; None until it is detected."""
        self._failure: UserError | None = None
        """Why it could not be."""
        self._goes_on = False
        """Whether Enter was pressed while the detection still ran."""

    @property
    def _machine(self) -> Hardware | None:
        return self.state.measured or self._here

    def compose(self) -> ComposeResult:
        """Yield the field and the facts."""
        with Horizontal(classes="line"):
            yield Static("Plan for", classes="label")
            yield Field(
                placeholder="this machine; or type one, such as 8xA100-40GB",
                suggester=SuggestFromList(EXAMPLES, case_sensitive=False),
                id="hardware-name",
            )
        yield Static("Memory and speed of all strategies are worked out for this hardware.", classes="sentence")
        with VerticalScroll(id="hardware-facts", can_focus=False):
            yield Static("detecting this machine ...", id="hardware-rows", markup=False)

    def on_mount(self) -> None:
        """Start looking at the machine."""
        if self._here is None:
            self._detect()
        else:
            self.post_message(self.Detected(self._here))

    @work(thread=True, exclusive=True)
    def _detect(self) -> None:
        found: Hardware | UserError
        try:
            with told_as("the detection of this machine", "type the machine by name, such as 8xA100-40GB"):
                found = detect()
        except UserError as error:
            found = error
        if not get_current_worker().is_cancelled:
            self.post_message(self.Detected(found))

    def on_hardware_step_detected(self, event: Detected) -> None:
        """Take what was found, and go on if Enter was pressed meanwhile."""
        event.stop()
        if isinstance(event.hardware, UserError):
            self._failure, self._goes_on = event.hardware, False
            self.query_one("#hardware-rows", Static).update("this machine is n/a: its detection failed")
            self.tell(self._failure)
            return
        self._here = event.hardware
        if not self.state.hardware_text:
            self.state.set_hardware(event.hardware)
        self._refresh()
        if self._goes_on:
            self._goes_on = False
            self.finish()

    def enter(self) -> None:
        """Show the hardware that the plan is for."""
        field = self.query_one("#hardware-name", Input)
        self.fill(field, self.state.hardware_text)
        self._refresh()
        field.focus()

    def complete(self) -> bool:
        """Take the hardware that is named, or this machine."""
        text = self.typed["hardware-name"].strip()
        if not text:
            if self._machine is None:
                self._goes_on = self._failure is None
                self.tell(self._failure)
                return False
            self.state.set_hardware(self._machine)
            return True
        return self._take(text)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show the named hardware as soon as the name is one."""
        self.heard(event)
        self._goes_on = False
        self.state.touched = True
        self.tell(None)
        text = event.value.strip()
        if not text:
            if self._machine is not None:
                self.state.set_hardware(self._machine)
        else:
            try:
                self.state.set_hardware(parse_hardware(text), text)
            except UserError:
                return  # still being typed; Enter tells what is wrong with it
        self._refresh()

    def _take(self, text: str) -> bool:
        try:
            self.state.set_hardware(parse_hardware(text), text)
        except UserError as error:
            self.tell(error)
            return False
        return True

    def _refresh(self) -> None:
        if self.state.hardware is not None:
            self.query_one("#hardware-rows", Static).update(grid(hardware_rows(self.state.hardware)))

    def action_scroll(self, lines: int) -> None:
        """Scroll the facts while the field has the focus."""
        pass_scroll(self.query_one("#hardware-facts"), lines)
