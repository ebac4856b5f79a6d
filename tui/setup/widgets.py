"""Small widgets of the wizard: the step bar, a settings field with its consequence, and the memory bar."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.reactive import reactive
from textual.widgets import Checkbox, Input, Static

from distui.tui.format import num_bytes
from distui.tui.setup.step import Field

EIGHTHS = " ▏▎▍▌▋▊▉█"

ROOM, TIGHT, OVER = "#56b4e9", "#e69f00", "#ff7a59"
"""Safe for colour-blind eyes; the words beside the bar say the same."""

TIGHT_SHARE = 0.9


class StepBar(Static):
    """Shows the steps: which are done, which one is shown."""

    current: reactive[int] = reactive(0)

    def __init__(self, titles: tuple[str, ...]) -> None:
        super().__init__(id="step-bar")
        self._titles = titles

    def render(self) -> Text:
        """Return `✓ Hardware ─ ▸ 2 Model ─ 3 Strategy ...`."""
        text = Text(" distui setup  ", style="bold", no_wrap=True)
        for index, title in enumerate(self._titles):
            if index:
                text.append(" ─ ", style="dim")
            if index < self.current:
                text.append(f"✓ {title}", style="dim")
            elif index == self.current:
                text.append(f" {index + 1} {title} ", style="bold reverse")
            else:
                text.append(f"{index + 1} {title}")
        return text


class SettingField(Vertical):
    """One setting: its name, a one-line input, one sentence on what it is, and what its value leads to."""

    def __init__(self, key: str, label: str, sentence: str, placeholder: str = "") -> None:
        super().__init__(id=f"field-{key.replace('.', '-')}", classes="setting")
        self.key = key
        self._label, self._sentence, self._placeholder = label, sentence, placeholder

    def compose(self) -> ComposeResult:
        """Yield label, input, sentence and consequence."""
        with Horizontal(classes="line"):
            yield Static(self._label, classes="label", markup=False)
            yield Field(placeholder=self._placeholder, name=self.key)
        yield Static(self._sentence, classes="sentence", markup=False)
        yield Static("", classes="consequence", markup=False)

    @property
    def input(self) -> Input:
        """The input of this field."""
        return self.query_one(Input)

    def tell(self, text: str, *, wrong: bool = False) -> None:
        """Show what the value leads to, or what is wrong with it."""
        line = self.query_one(".consequence", Static)
        line.update(("✗ " if wrong else "→ ") + text)
        line.set_class(wrong, "wrong")


class Filter(Checkbox):
    """A checkbox that says without colour whether it is on."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        """What stands between its sides: textual writes an X in both states and dims one of them."""
        return "X" if self.value else " "


def memory_bar(used: int | None, limit: int | None, width: int) -> Text:
    """Return a bar of `used` against `limit`, with the bytes in words; beyond the limit it says so in words too."""
    if used is None:
        return Text("n/a".ljust(width), style="dim")
    if not limit:
        return Text(f"{num_bytes(used)} (limit n/a)")
    share = used / limit
    eighths = min(round(share * width * 8), width * 8)
    full, rest = divmod(eighths, 8)
    bar = ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width, "·")
    over = share > 1
    text = Text()
    text.append(bar, style=OVER if over else TIGHT if share > TIGHT_SHARE else ROOM)
    text.append(f" {num_bytes(used)}", style="bold" if over else "")
    if over:
        text.append(f" = {share:.1f}x", style="bold")
    return text
