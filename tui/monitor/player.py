"""The line of a recording: where it stands, how fast it plays, what happened when; and the keys that move it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input, Static

from distui.tui.format import clock, duration
from distui.tui.widgets.chart import MARK_GLYPHS, MARK_TONES
from distui.tui.widgets.palette import ink_of, line

SPEEDS = (1, 2, 4, 8, 16, 32, 64)
STRIDE_S = 10.0
"""How far an arrow goes at speed 1; at speed 64 it is 64 times as far."""


class Player(Protocol):
    """A recording that can be moved through. Times are Unix seconds."""

    playing: bool
    speed: int
    busy: tuple[str, float] | None
    """What it is busy with, and the share that is done."""

    @property
    def epoch(self) -> int:
        """Grows when the cursor went back, and what was sent before no longer holds."""

    @property
    def first_s(self) -> float:
        """When the recording begins."""

    @property
    def last_s(self) -> float:
        """When it ends so far."""

    @property
    def at_s(self) -> float:
        """Where the cursor is."""

    def play_or_pause(self) -> None:
        """Stop or go on."""

    def seek(self, to_s: float) -> None:
        """Go to a moment."""

    def change_speed(self, by: int) -> None:
        """Take the next speed, or the one before."""


REPLAY_BINDINGS: tuple[BindingType, ...] = (
    Binding("space", "replay('play')", "Play", key_display="space", priority=True),
    Binding("left", "replay('back')", "Back", show=False, priority=True),
    Binding("right", "replay('on')", "On", show=False, priority=True),
    Binding("home", "replay('first')", "Start", show=False, priority=True),
    Binding("end", "replay('last')", "End", show=False, priority=True),
    Binding("plus,equals_sign", "replay('faster')", "Faster", show=False, priority=True),
    Binding("minus", "replay('slower')", "Slower", show=False, priority=True),
    Binding("percent_sign,g", "replay('ask')", "Go to", key_display="g", priority=True),
)


def move(player: Player, how: str) -> None:
    """Do what a key asks of the player."""
    stride_s = STRIDE_S * player.speed
    if how == "play":
        player.play_or_pause()
    elif how in ("back", "on"):
        player.seek(player.at_s + (stride_s if how == "on" else -stride_s))
    elif how in ("first", "last"):
        player.seek(player.first_s if how == "first" else player.last_s)
    elif how in ("faster", "slower"):
        player.change_speed(1 if how == "faster" else -1)


def parse_place(text: str, player: Player, steps: Sequence[tuple[float, float]] = ()) -> float | None:
    """Return the moment that `42%`, `1:30`, `90s` or `step 120` names; None where it names none.

    `steps` are (step, time) as far as they are known. Units: Unix seconds.
    """
    text = text.strip().lower()
    length_s = player.last_s - player.first_s
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return player.first_s + length_s * min(100.0, float(found[1])) / 100
    if found := re.fullmatch(r"(?:step\s*|#)(\d+)", text):
        return next((time_s for step, time_s in steps if step >= int(found[1])), None)
    if found := re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d)", text):
        return player.first_s + int(found[1] or 0) * 3600 + int(found[2]) * 60 + int(found[3])
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])?", text):
        return player.first_s + float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]
    return None


class PlayerBar(Widget):
    """One line: playing or not, speed, time since the start, a track with the events, the length. A click seeks."""

    DEFAULT_CSS = "PlayerBar { height: 1; background: $panel; }"

    def __init__(self, player: Player, id: str | None = None) -> None:
        super().__init__(id=id)
        self._player = player
        self._marks: list[tuple[float, int]] = []
        self._track = (0, 1)
        self._drawn: object = None

    def show(self, marks: Sequence[tuple[float, int]]) -> None:
        """Take (time, level) of the events known so far; the player itself is looked at."""
        player = self._player
        drawn = (player.at_s, player.last_s, player.playing, player.speed, player.busy, len(marks))
        if drawn != self._drawn:
            self._drawn, self._marks = drawn, list(marks)
            self.refresh()

    @property
    def text(self) -> str:
        """The line as plain text."""
        return self.render_line(0).text

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        ink, width, player = ink_of(self), self.size.width, self._player
        length_s = max(1e-9, player.last_s - player.first_s)
        share = max(0.0, min(1.0, (player.at_s - player.first_s) / length_s))
        if player.busy is not None:
            state = f" … {player.busy[0]} {player.busy[1]:.0%} "
        else:
            state = f" {'▶' if player.playing else '❚❚'} {player.speed}x "
        left = f"{state} {duration(player.at_s - player.first_s)} "
        right = f" {duration(length_s)}  {share:.0%}  {clock(player.at_s)} "
        room = max(4, width - len(left) - len(right))
        self._track = (len(left), room)
        place = round(share * (room - 1))
        cells: list[tuple[str, Style]] = [("━" if x < place else "─", ink.tone("accent")) for x in range(room)]
        for time_s, level in self._marks:
            x = round((time_s - player.first_s) / length_s * (room - 1))
            if level and 0 <= x < room:
                cells[x] = (MARK_GLYPHS[min(level, 2)], ink.tone(MARK_TONES[min(level, 2)]))
        cells[place] = ("●", ink.bold)
        return line([(left, ink.bold), *cells, (right, ink.muted)], width, ink.text)

    def on_click(self, event: events.Click) -> None:
        """Go to the moment under the pointer."""
        start, room = self._track
        share = max(0.0, min(1.0, (event.x - start) / max(1, room - 1)))
        self._player.seek(self._player.first_s + share * (self._player.last_s - self._player.first_s))


class PlaceScreen(ModalScreen[float]):
    """Asks where to go; gives the moment in Unix seconds."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back", key_display="esc")]

    def __init__(self, parse: Callable[[str], float | None]) -> None:
        super().__init__()
        self._parse = parse

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Vertical(classes="question") as box:
            box.border_title = "go to"
            yield Static("42%   1:30   90s   step 120", id="place-told", markup=False)
            yield Input(id="place", compact=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Give the moment, or say that there is none."""
        if (to_s := self._parse(event.value)) is not None:
            self.dismiss(to_s)
        else:
            told = f"{event.value!r} is no place: 42%, 1:30, 90s, or step 120 (a step that was played already)"
            self.query_one("#place-told", Static).update(told)

    def action_leave(self) -> None:
        """Stay."""
        self.dismiss(None)
