"""The line of keys at the bottom, as one widget: Textual's footer makes a widget a key anew at each change of focus."""

from __future__ import annotations

from rich.style import Style
from textual import events
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget

from distui.tui.widgets.palette import ink_of, line


class KeyLine(Widget):
    """Shows the bindings that work now; a click presses one. What does not fit is left out whole, from the end."""

    ALLOW_SELECT = False
    DEFAULT_CSS = "KeyLine { dock: bottom; height: 1; background: $panel; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._shown: list[tuple[str, str, str]] = []
        """Key, how it is written, and what it does; the palette, which stands at the right, comes last."""
        self._places: list[tuple[int, int, str]] = []

    @property
    def shown(self) -> list[str]:
        """What the keys do that are offered."""
        return [what for _, _, what in self._shown]

    def on_mount(self) -> None:
        """Listen for bindings that come and go."""
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, screen: Screen[object]) -> None:
        if screen is not self.screen or not self.is_attached:
            return
        found: dict[str, tuple[str, str, str]] = {}
        palette = None
        for _, binding, enabled, _ in screen.active_bindings.values():
            one = binding.key, self.app.get_key_display(binding), binding.description
            if binding.key == self.app.COMMAND_PALETTE_BINDING:
                palette = one
            elif binding.show and enabled:
                found.setdefault(binding.action, one)
        shown = list(found.values()) + ([palette] if palette is not None and self.app.ENABLE_COMMAND_PALETTE else [])
        if shown != self._shown:
            self._shown = shown
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        ink, width = ink_of(self), self.size.width
        key_style = ink.tone("accent") + Style(bold=True)
        parts: list[tuple[str, Style]] = []
        self._places = []
        used = 0
        last = self._shown[-1] if self._shown else None
        at_right = last is not None and last[0] == self.app.COMMAND_PALETTE_BINDING
        room = width - (len(last[1]) + len(last[2]) + 4 if last is not None and at_right else 0)
        for key, written, what in self._shown[: len(self._shown) - at_right]:
            size = len(written) + len(what) + 2
            if used + size > room:
                break
            parts += [(f" {written}", key_style), (f" {what}", ink.text)]
            self._places.append((used, used + size, key))
            used += size
            if used < room:
                parts.append((" ", ink.text))
                used += 1
        if last is not None and at_right and room > 0:
            parts += [(" " * (room - used), ink.text), ("│", ink.faint)]
            parts += [(f" {last[1]}", key_style), (f" {last[2]}", ink.text)]
            self._places.append((room, width, last[0]))
        return line(parts, width, ink.text)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Press the key under the mouse."""
        for start, stop, key in self._places:
            if start <= event.x < stop:
                self.app.simulate_key(key)
