"""A widget that is drawn as a whole, kept until something changes, and handed out line by line."""

from __future__ import annotations

from textual.strip import Strip
from textual.widget import Widget

from distui.tui.widgets.palette import Ink, ink_of


class DrawnWidget(Widget):
    """Keeps the lines that `_draw` made; `redraw` forgets them."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._strips: list[Strip] | None = None

    def _draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        """Return the lines at this size and in this theme."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Draw anew: there are other values to show."""
        self._strips = None
        self.refresh()

    def on_resize(self) -> None:
        """Draw anew at the new size."""
        self._strips = None

    def notify_style_update(self) -> None:
        """Draw anew in the new theme."""
        super().notify_style_update()
        self._strips = None

    def render_line(self, y: int) -> Strip:
        """Draw one line."""
        if self._strips is None:
            self._strips = self._draw(self.size.width, self.size.height, ink_of(self))
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)
