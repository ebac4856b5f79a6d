"""The lines above the views: the run, the verdict, the tabs."""

from __future__ import annotations

from rich.color import Color
from rich.style import Style
from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import cut, duration
from distui.tui.monitor.model import RunModel
from distui.tui.monitor.verdict import Verdict
from distui.tui.widgets.palette import ink_of, line


class RunLine(Widget):
    """The run's name and size, how long it lasts, and whether the daemon is away or the picture is frozen."""

    DEFAULT_CSS = "RunLine { height: 1; background: $panel; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._left: list[tuple[str, str]] = []
        self._right: list[tuple[str, str]] = []

    def show(self, model: RunModel, now_s: float, away_s: float | None, paused: str) -> None:
        """Take what is to be said; what does not fit is left out whole, least important first."""
        run = model.run
        left = [(" distui ", "accent"), (model.run_id or "newest run", "bold")]
        right: list[tuple[str, str]] = []
        if away_s is not None:
            right.append((f"▲ daemon away {duration(away_s)}", "warn"))
        if paused:
            right.append((paused, "warn"))
        elapsed = model.elapsed_s(now_s)
        right.append((duration(elapsed), "bold"))
        if progress := progress_of(model.snapshot):
            right.append((progress, "bold"))
        if run.restarts:
            right.append((restarts_of(model.snapshot, run.restarts), "warn"))
        if run.world_size:
            right.append((f"{run.world_size:,} rank{'s' if run.world_size != 1 else ''}", ""))
        if run.num_nodes:
            right.append((f"{run.num_nodes:,} node{'s' if run.num_nodes != 1 else ''}", ""))
        if run.command:
            right.append((cut(" ".join(run.command), 48), "muted"))
        if (left, right) != (self._left, self._right):
            self._left, self._right = left, right
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        ink, width = ink_of(self), self.size.width
        room = width - 9
        kept: list[tuple[str, str]] = []
        name_width = len(self._left[1][0]) + 2 if self._left else 0
        for text, tone in self._right:
            # The run's whole name is worth more than its command; what is wrong is worth more than the name.
            if len(text) + 2 <= room - (min(20, room // 2) if tone == "warn" else min(name_width, room * 2 // 3)):
                kept.append((text, tone))
                room -= len(text) + 2
        parts: list[tuple[str, Style]] = []
        if self._left:
            name = cut(self._left[1][0], max(4, room - 2))
            parts = [(self._left[0][0], ink.tone("accent") + Style(bold=True)), (name, ink.bold)]
            parts.append((" " * max(0, room - len(name) - 1), ink.text))
        # The most important is said at the very right, where the eye looks for the time.
        for text, tone in reversed(kept):
            parts += [("  ", ink.text), (text, ink.tone(tone))]
        return line(parts, width, ink.text)


def progress_of(found: pb.Snapshot | None) -> str:
    """Return `40/200 20%, 3m 05s left`, as far as it is known; short, so that it fits beside a run's name."""
    if found is None or not found.HasField("total_steps"):
        return ""
    left = f", {duration(found.left_s)} left" if found.HasField("left_s") else ""
    return f"{found.step:,}/{found.total_steps:,} {found.step / found.total_steps:.0%}{left}"


def restarts_of(found: pb.Snapshot | None, restarts: int) -> str:
    """Return `2 restarts, 93% effective`."""
    words = f"{restarts} restart{'s' * (restarts > 1)}"
    known = found is not None and found.HasField("effort")
    return f"{words}, {found.effort.effective:.0%} effective" if found is not None and known else words


class VerdictLine(Widget):
    """The verdict: state as a badge, strategy, and one sentence. Two lines where one does not hold it."""

    DEFAULT_CSS = "VerdictLine { height: 1; } VerdictLine.-long { height: 2; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._verdict = Verdict("calm", "◌", "waiting", "")
        self._strategy = ""

    @property
    def text(self) -> str:
        """The verdict as plain text."""
        return "  ".join(filter(None, (f"{self._verdict.glyph} {self._verdict.state}", self._verdict.message)))

    def show(self, verdict: Verdict, strategy: str) -> None:
        """Take a verdict."""
        if (verdict, strategy) != (self._verdict, self._strategy):
            self._verdict, self._strategy = verdict, strategy
            self._fit()
            self.refresh()

    def on_resize(self) -> None:
        """Take a second line where one is too short."""
        self._fit()

    def _badge(self) -> str:
        return f" {self._verdict.glyph} {self._verdict.state} "

    def _fit(self) -> None:
        self.set_class(len(self._badge()) + 2 + len(self._verdict.message) > self.size.width > 0, "-long")

    def render_line(self, y: int) -> Strip:
        """Draw a line."""
        ink, width = ink_of(self), self.size.width
        tone = ink.tone(self._verdict.tone)
        badge, message = self._badge(), self._verdict.message
        head = len(badge) + 1
        room = width - head - 1
        style = ink.bold if self._verdict.tone == "good" else tone + Style(bold=True)
        if y == 1:
            return line(
                [(" " * head, ink.text), (cut(message[_break(message, room) :].lstrip(), room), style)], width, ink.text
            )
        first = message if len(message) <= room else message[: _break(message, room)]
        parts = [(badge, _inverse(tone)), (" ", ink.text), (first, style)]
        if self._strategy and head + len(first) + len(self._strategy) + 4 <= width:
            gap = width - head - len(first) - len(self._strategy) - 1
            parts += [(" " * gap, ink.text), (self._strategy, ink.muted)]
        return line(parts, width, ink.text)


def _break(message: str, room: int) -> int:
    place = message.rfind(" ", 0, room + 1)
    return place if place > room // 2 else room


def _inverse(tone: Style) -> Style:
    return Style(
        color=Color.parse("#10141a") if _bright(tone) else Color.parse("#ffffff"), bgcolor=tone.color, bold=True
    )


def _bright(tone: Style) -> bool:
    if tone.color is None or tone.color.triplet is None:
        return True
    red, green, blue = tone.color.triplet
    return 0.3 * red + 0.59 * green + 0.11 * blue > 120


class Tabs(Widget):
    """The views' names with their number keys; a click opens one."""

    DEFAULT_CSS = "Tabs { height: 1; }"

    class Chosen(Message):
        """A view's name was clicked."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, titles: list[str], id: str | None = None) -> None:
        super().__init__(id=id)
        self._titles, self._current = titles, 0

    def choose(self, index: int) -> None:
        """Mark the view that is open."""
        self._current = index
        self.refresh()

    def _places(self) -> list[tuple[int, int, str]]:
        """Return (start, stop, title) of each; titles are shortened together where the line is short."""
        spare = self.size.width - sum(len(title) + 3 for title in self._titles)
        pad = max(0, min(2, spare // len(self._titles)))
        titles = self._titles if spare >= 0 else [title[:3] for title in self._titles]
        places, left = [], 0
        for number, title in enumerate(titles, start=1):
            text = f" {number} {title}{' ' * pad}"
            places.append((left, left + len(text), text))
            left += len(text)
        return places

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        ink = ink_of(self)
        chosen = ink.tone("accent") + Style(bold=True, reverse=True)
        parts = [(text, chosen if n == self._current else ink.muted) for n, (_, _, text) in enumerate(self._places())]
        return line(parts, self.size.width, ink.text)

    def on_click(self, event: events.Click) -> None:
        """Open the view under the pointer."""
        for index, (start, stop, _) in enumerate(self._places()):
            if start <= event.x < stop:
                self.post_message(self.Chosen(index))
