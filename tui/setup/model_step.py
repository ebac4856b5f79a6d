"""Step 2: which model, as a preset, a config.json, a number of parameters, or a script's own function."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from distui.core.errors import Problem, UserError
from distui.core.plan.presets import PRESETS
from distui.core.plan.types import ModelSpec
from distui.tui.format import si
from distui.tui.setup.facts import UNKNOWN_MODEL_ROWS, grid, model_rows
from distui.tui.setup.model import WizardState
from distui.tui.setup.script_models import is_script
from distui.tui.setup.step import Field, Step, pass_scroll

UNKNOWN = "my script's model (size n/a)"
TYPED_ID = "typed"
UNKNOWN_ID = "unknown"


class ModelStep(Step):
    """One field that filters the presets and takes a path or a count, the list, and the highlighted model's facts."""

    TITLE = "Model"
    HELP = (
        "The model's shapes decide what it needs. Type a part of a preset's name to filter the list, a number of "
        "parameters such as 350M or 7B (typical shapes are assumed then), the path of a Hugging Face config.json, or "
        "train.py:build_model, a function that returns your model: it is built on the meta device, without memory. "
        "Up and Down move in the list. The sequence length decides the memory of activations, not of model states. "
        "With the first entry nothing is predicted, and the safe strategy is offered."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move('cursor_up')", show=False),
        Binding("down", "move('cursor_down')", show=False),
        Binding("pageup", "move('page_up')", show=False),
        Binding("pagedown", "move('page_down')", show=False),
        Binding("shift+up", "scroll(-1)", show=False),
        Binding("shift+down", "scroll(1)", show=False),
    ]

    class Built(Message):
        """The model of a script has been built, or not."""

        def __init__(self, text: str, error: UserError | None) -> None:
            super().__init__()
            self.text, self.error = text, error

    def __init__(self, state: WizardState) -> None:
        super().__init__(state)
        self._building = ""
        """The script's function that is being called, in a thread."""

    @work(thread=True, exclusive=True)
    def _build(self, text: str) -> None:
        error = None
        try:
            self.state.models.load(text)
        except UserError as found:
            error = found
        if not get_current_worker().is_cancelled:
            self.post_message(self.Built(text, error))

    def on_model_step_built(self, event: Built) -> None:
        """Go on with the model, unless something else has been typed meanwhile; tell what went wrong."""
        event.stop()
        if self._building != event.text:
            return
        self._building = ""
        self._show_highlighted()
        if event.error is not None:
            self.tell(event.error)
        elif self.display and self._highlighted() == event.text:
            self.finish()

    def compose(self) -> ComposeResult:
        """Yield the two fields, the list and the facts."""
        with Horizontal(classes="line"):
            yield Static("Model", classes="label")
            yield Field(placeholder="filter, 7B, config.json, train.py:build", id="model-name")
            yield Static("Tokens a sample", classes="label second")
            yield Field(placeholder="the model's", id="sequence-length")
        yield Static("Its shapes decide memory and speed; longer samples need more activations.", classes="sentence")
        with Horizontal(id="model-panes"):
            yield OptionList(id="model-list", compact=True)
            with Vertical(id="model-pane"):
                yield Static("", id="model-title", markup=False)
                with VerticalScroll(can_focus=False, id="model-facts"):
                    yield Static("", id="model-rows", markup=False)

    def enter(self) -> None:
        """Show the model that is chosen."""
        length = self.state.sequence_length
        self.fill(self.query_one("#sequence-length", Input), "" if length is None else str(length))
        is_preset = self.state.model_text in PRESETS
        field = self.query_one("#model-name", Input)
        self.fill(field, "" if is_preset else self.state.model_text)
        self._list(self.typed["model-name"], self.state.model_text or UNKNOWN_ID)
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter the list, or take the length, at once."""
        name = self.heard(event)
        self.state.touched = True
        self._building = ""
        self.tell(None)
        if name == "model-name":
            self._list(event.value.strip())
        else:
            trouble = self.state.set_sequence_length(event.value)
            self.tell(trouble)
            self._show_highlighted()

    def _list(self, text: str, wanted: str | None = None) -> None:
        """Fill the list with what `text` may mean and highlight `wanted`, or the best match."""
        options = []
        if text and text not in PRESETS and self._loads(text):
            options.append(Option(f"as typed: {text}", id=TYPED_ID))
        lowered = text.lower()
        options += [Option(name, id=name) for name in PRESETS if lowered in name]
        if not text:
            options.insert(0, Option(UNKNOWN, id=UNKNOWN_ID))
        names = self.query_one("#model-list", OptionList)
        names.clear_options()
        names.add_options(options)
        ids = [option.id for option in options]
        target = TYPED_ID if wanted == text and TYPED_ID in ids else text if text in ids else wanted
        names.highlighted = ids.index(target) if target in ids else 0 if options else None
        self._show_highlighted()

    def _loads(self, text: str) -> bool:
        if is_script(text):
            return True
        try:
            self.state.models.load(text)
        except UserError:
            return False
        return True

    def _highlighted(self) -> str | None:
        """Return the text of the highlighted model, empty for the unknown one; None where the list is empty."""
        option = self.query_one("#model-list", OptionList).highlighted_option
        if option is None or option.id is None:
            return None
        typed = self.typed["model-name"].strip()
        return {UNKNOWN_ID: "", TYPED_ID: typed}.get(option.id, option.id)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show the facts of the highlighted model."""
        event.stop()
        self._show_highlighted()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take Enter in the list as `next`."""
        event.stop()
        self.finish()

    def _show_highlighted(self) -> None:
        text = self._highlighted()
        title, rows = self.query_one("#model-title", Static), self.query_one("#model-rows", Static)
        if text is None:
            title.update("no model of this name")
            rows.update("Enter says what is known of the name.")
        elif not text:
            title.update("Your script's own model")
            rows.update(grid(UNKNOWN_MODEL_ROWS))
        elif not self.state.models.is_loaded(text):
            title.update(f"building {text} ..." if self._building == text else text)
            rows.update("Enter builds it on the meta device, without memory, in a process of its own; some seconds.")
        else:
            try:
                model = self._shaped(self.state.models.load(text))
            except UserError as error:  # a file that has changed since it was listed
                title.update(error.what)
                rows.update(f"{error.why}; {error.fix}")
                return
            title.update(f"{model.name}  {si(model.num_parameters)} parameters")
            rows.update(grid(model_rows(model)))

    def _shaped(self, model: ModelSpec) -> ModelSpec:
        length = self.state.sequence_length
        return model if length is None else replace(model, sequence_length=length)

    def complete(self) -> bool:
        """Take the highlighted model, or tell what is wrong with what was typed."""
        typed = self.typed["model-name"].strip()
        if trouble := self.state.set_sequence_length(self.typed["sequence-length"]):
            self.tell(trouble)
            return False
        text = self._highlighted()
        if text and not self.state.models.is_loaded(text):
            if self._building != text:
                self._building = text
                self._build(text)
            self._show_highlighted()
            return False
        try:
            self.state.set_model(typed if text is None else text)
        except UserError as error:
            self.tell(_shortened(error))
            return False
        return True

    def action_move(self, action: str) -> None:
        """Move in the list while the field has the focus."""
        names = self.query_one("#model-list", OptionList)
        getattr(names, f"action_{action}")()

    def action_scroll(self, lines: int) -> None:
        """Scroll the facts while the field has the focus."""
        pass_scroll(self.query_one("#model-facts"), lines)


def _shortened(error: UserError) -> UserError | Problem:
    """Return the error without the list of all presets, which is on the screen already."""
    if error.why.startswith("presets are"):
        return Problem("model", error.what, f"none of the {len(PRESETS)} presets has this name", error.fix)
    return error
