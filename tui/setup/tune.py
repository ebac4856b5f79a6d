"""Change one strategy by hand: every field with its sentence, and what each of its values would lead to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Static

from distui.core.config.schema import keys
from distui.core.plan.types import Plan
from distui.tui.format import NA, num_bytes, si
from distui.tui.setup.changes import changed
from distui.tui.setup.model import WizardState
from distui.tui.setup.planning import Choice

OPTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "strategy.zero_stage": ("ZeRO stage", (0, 1, 2, 3)),
    "precision.dtype": ("Precision", ("fp32", "bf16", "fp16")),
    "offload.optimizer": ("Optimizer on", ("none", "cpu", "nvme")),
    "offload.params": ("Parameters on", ("none", "cpu", "nvme")),
    "activation_checkpointing.mode": ("Checkpointing", ("none", "selective", "full")),
    "batch.micro_size": ("Micro-batch", ()),
    "batch.accumulation": ("Accumulation", ()),
}
"""Label and values of each field; a field without values counts, and doubles or halves."""

MIN_COLUMNS = 68

COUNTS = [1 << power for power in range(13)]


def neighbours(value: int | None) -> list[int]:
    """Return half of a count, the count itself, and its double; three small ones for none."""
    if value is None:
        return COUNTS[:3]
    return sorted({max(1, value // 2), value, min(value * 2, COUNTS[-1])})


class TuneField(Static, can_focus=True):
    """One field: left and right change it, and under its sentence stands what each value leads to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "turn(-1)", "Less"),
        Binding("right", "turn(1)", "More"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    class Turned(Message):
        """The field has another value now."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(id=f"tune-{key.replace('.', '-')}", classes="tune")
        self.key, self.chosen = key, value

    def values(self) -> tuple[Any, ...]:
        """Return the values to compare, the chosen one among them."""
        return OPTIONS[self.key][1] or tuple(neighbours(self.chosen))

    def action_turn(self, by: int) -> None:
        """Take the next value, or the one before."""
        values = self.values()
        at = values.index(self.chosen) if self.chosen in values else -1 if by > 0 else 1
        self.chosen = values[min(max(at + by, 0), len(values) - 1)]
        self.post_message(self.Turned())

    def show(self, plans: dict[Any, Plan | None]) -> None:
        """Show the field, its sentence, and bytes and tokens/s of each value."""
        chosen = "as the script has it" if self.chosen is None else str(self.chosen)
        text = Text()
        text.append(f"{OPTIONS[self.key][0]:<14} ", style="bold")
        text.append(f"‹ {chosen} ›\n", style="reverse" if self.has_focus else "")
        text.append(f"{keys()[self.key].description}\n", style="dim")
        used = 0
        for value, plan in plans.items():
            words = f"{value}: {_effect(plan)}"
            # A value and its numbers stay on one line; textual would break them at any space.
            fits = used and used + 3 + len(words) <= (self.content_size.width or MIN_COLUMNS)
            text.append(("   " if fits else "\n  " if used else "→ "), style="dim")
            text.append(words, style="bold" if value == self.chosen else "")
            used = (used + 3 if fits else 2) + len(words)
        self.update(text)


def _effect(plan: Plan | None) -> str:
    if plan is None:
        return NA
    mark = "" if plan.fits or plan.memory_limit_bytes is None else "✗ "
    speed = si(plan.tokens_per_s)
    return f"{mark}{num_bytes(plan.memory_per_rank_bytes)} {speed}{'' if speed == NA else '/s'}"


class TuneScreen(ModalScreen[Choice | None]):
    """All fields of one strategy; Enter takes them, Esc leaves the strategy as it was."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "take", "Take"),
        Binding("escape", "dismiss(None)", "Back"),
    ]

    def __init__(self, state: WizardState, choice: Choice) -> None:
        super().__init__()
        self._state, self._choice = state, choice
        self._was = self._values_of(choice)

    def _values_of(self, choice: Choice) -> dict[str, Any]:
        found = {key: choice.values.get(key, self._state.value(key)) for key in OPTIONS}
        if choice.plan is not None:
            found |= {"batch.micro_size": choice.plan.micro_size, "batch.accumulation": choice.plan.accumulation}
        return found

    def compose(self) -> ComposeResult:
        """Yield what is predicted, the fields, and the keys."""
        with Vertical(classes="dialog tuning"):
            yield Static("", id="tuned", classes="dialog-title", markup=False)
            with VerticalScroll(can_focus=False):
                for key, value in self._was.items():
                    yield TuneField(key, value)
            yield Static("Each value with memory a rank and tokens/s. ← → change, ↑ ↓ move, Enter, Esc")

    def on_mount(self) -> None:
        """Begin with the first field."""
        self.query(TuneField).first().focus()
        self._show()

    def on_tune_field_turned(self, event: TuneField.Turned) -> None:
        """Predict everything again."""
        event.stop()
        self._show()

    def on_descendant_focus(self) -> None:
        """Mark the field that has the focus."""
        self._show()

    def chosen(self, **other: Any) -> Choice:
        """Return the strategy as it stands, with `other` values in place of some."""
        values = {field.key: field.chosen for field in self.query(TuneField)} | other
        # Micro-batch and accumulation are given here, so the global batch follows from them.
        return changed(self._state, self._choice, {**values, "batch.global_size": None})

    def _show(self) -> None:
        now = self.chosen()
        plan = now.plan
        effect = "memory and speed are n/a, since the model's size is not known"
        if self._state.failure is not None:
            effect = f"memory and speed are n/a: {self._state.failure.why}"
        if plan is not None:
            limit = num_bytes(plan.memory_limit_bytes)
            effect = f"{num_bytes(plan.memory_per_rank_bytes)} of {limit} a rank, {si(plan.tokens_per_s, 'tokens/s')}"
        self.query_one("#tuned", Static).update(f"{now.name}: {effect}")
        for field in self.query(TuneField):
            field.show({value: self.chosen(**{field.key: value}).plan for value in field.values()})

    def action_take(self) -> None:
        """Leave with the strategy as it stands."""
        choice = self.chosen()
        sizes = {field.key: field.chosen for field in self.query(TuneField) if field.key.startswith("batch.")}
        values = {key: value for key, value in choice.values.items() if not key.startswith("batch.")}
        # Sizes that nobody turned are the planner's, and no answer.
        if choice.plan is not None and any(self._was[key] != size for key, size in sizes.items()):
            plan = choice.plan
            values |= {"batch.micro_size": plan.micro_size, "batch.global_size": plan.global_size}
            values["batch.accumulation"] = None
        self.dismiss(replace(choice, values=values))
