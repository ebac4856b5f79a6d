"""A log on the Line API: follows its end, scrolls back, shows what a terminal would act on as nothing."""

from __future__ import annotations

import re
from collections import deque
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from distui.core.telemetry.harmless import harmless
from distui.tui.widgets.palette import ink_of, line

MAX_LINES = 10_000
_BAD = re.compile(r"\b(?:error|exception|traceback|failed|fatal)\b", re.IGNORECASE)
_WARN = re.compile(r"\bwarn(?:ing)?\b", re.IGNORECASE)


def clean(text: str) -> str:
    """Return a line as it may be shown: of a progress bar the last state, tabs as blanks, no escape sequences.

    A log is not ours: what is in it must not move the cursor, set the title or paint outside its line.
    """
    return harmless(text.rstrip("\r").rpartition("\r")[2].expandtabs(4))


class LogView(ScrollView, can_focus=True):
    """Lines of a log. `append` and `prepend` take bytes as they are read."""

    DEFAULT_CSS = "LogView { height: 1fr; scrollbar-size: 1 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_by(-1)", "Up", show=False),
        Binding("down,j", "scroll_by(1)", "Down", show=False),
        Binding("home", "top", "Start", show=False),
        Binding("end", "bottom", "End", show=False),
    ]

    class WantsMore(Message):
        """The top is reached: earlier lines are wanted."""

    def __init__(self, *, empty: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._rest = b""
        self.empty = empty
        self.following = True
        """Whether new lines pull the view to the end."""

    @property
    def num_lines(self) -> int:
        """How many lines are held."""
        return len(self._lines) + bool(self._rest)

    @property
    def lines(self) -> list[str]:
        """The lines that are held, as they are shown."""
        return [text for index in range(self.num_lines) if (text := self._text(index)) is not None]

    def clear(self) -> None:
        """Drop everything and follow again."""
        self._lines.clear()
        self._rest, self.following = b"", True
        self._resized()

    def append(self, data: bytes) -> None:
        """Add what came after; a line that is not ended yet is shown as far as it goes."""
        if not data:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(clean(text.decode("utf-8", "replace")) for text in lines)
        self._resized()

    def prepend(self, data: bytes) -> None:
        """Add what came before, whole lines; what is in view stays in view."""
        lines = [clean(text.decode("utf-8", "replace")) for text in data.split(b"\n")]
        if lines and not lines[-1]:
            lines.pop()
        room = MAX_LINES - len(self._lines)
        added = lines[-room:] if room > 0 else []
        self._lines.extendleft(reversed(added))
        self._resized()
        self.scroll_to(y=self.scroll_offset.y + len(added), animate=False, force=True)

    def _text(self, index: int) -> str | None:
        if index < len(self._lines):
            return self._lines[index]
        return clean(self._rest.decode("utf-8", "replace")) if index == len(self._lines) and self._rest else None

    def _resized(self) -> None:
        widest = max((len(text) for text in self._lines), default=0)
        self.virtual_size = Size(widest + 2, self.num_lines)
        if self.following and self.is_attached:
            # Forced, because whether it may scroll is known only after the layout.
            self.scroll_end(animate=False, immediate=True, force=True)
        self.refresh()

    def on_resize(self) -> None:
        """Stay at the end while following."""
        self._resized()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Ask for earlier lines at the top; stop following when the reader scrolls back."""
        super().watch_scroll_y(old_value, new_value)
        if new_value < old_value:
            self.following = new_value >= self.max_scroll_y
            if new_value <= 0:
                self.post_message(self.WantsMore())
        elif new_value >= self.max_scroll_y:
            self.following = True

    def action_scroll_by(self, by: int) -> None:
        """Scroll by lines."""
        self.scroll_to(y=self.scroll_offset.y + by, animate=False)

    def action_top(self) -> None:
        """Go to the earliest line held."""
        self.scroll_to(y=0, animate=False)

    def action_bottom(self) -> None:
        """Go to the end and follow it."""
        self.following = True
        self._resized()

    def render_line(self, y: int) -> Strip:
        """Draw one line, with warnings and errors set off."""
        ink, width = ink_of(self), self.size.width
        text = self._text(y + self.scroll_offset.y)
        if text is None:
            told = f" {self.empty}" if y == 0 and not self.num_lines else ""
            return line([(told, ink.muted)], width, ink.text)
        style = ink.tone("bad") if _BAD.search(text) else ink.tone("warn") if _WARN.search(text) else ink.text
        return line([(" " + text, style)], max(width, self.virtual_size.width), ink.text).crop(
            self.scroll_offset.x, self.scroll_offset.x + width
        )
