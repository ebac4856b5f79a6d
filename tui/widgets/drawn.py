"""Widgets that keep the lines they have drawn, and repaint only those that new values change.

`changed` draws what is in sight anew and compares: a line that is the same is neither styled, nor encoded, nor written
to the terminal again. Any other `refresh` (scrolling, focus, theme, size) draws all of it anew.
"""

from __future__ import annotations

from typing import TypeVar

from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

from distui.tui.widgets.palette import Ink, ink_of

Kept = TypeVar("Kept", bound="KeptLines")


class KeptLines(Widget):
    """Keeps its lines by their place on the screen; `draw_line` draws one."""

    _kept: dict[int, Strip] | None = None
    _kept_size = Size(0, 0)
    _kept_ink: Ink | None = None
    _drawn_key: object = None

    def draw_line(self, y: int) -> Strip:
        """Return the line at `y`, counted from the top of what is in sight."""
        raise NotImplementedError

    @property
    def ink(self) -> Ink:
        """The styles under the present theme."""
        if self._kept_ink is None:
            self._kept_ink = ink_of(self)
        return self._kept_ink

    def is_new(self, key: object) -> bool:
        """Return whether `key`, which stands for all values to be shown, is another than the last time."""
        if key == self._drawn_key:
            return False
        self._drawn_key = key
        return True

    def forget(self) -> None:
        """Forget what was drawn."""
        self._kept = self._kept_ink = None

    def changed(self) -> None:
        """Repaint the lines that other values change."""
        old = self._kept
        if not old or not self.is_attached or self._kept_size != self.size:
            self.refresh()
            return
        self._kept = None
        width = self.size.width
        dirty = [Region(0, y, width, 1) for y, strip in old.items() if self.render_line(y) != strip]
        if dirty:
            super().refresh(*dirty)

    def refresh(
        self: Kept, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False
    ) -> Kept:
        """Draw all anew: what is kept must be what is on the screen."""
        if repaint:
            self.forget()
            regions = ()
        return super().refresh(*regions, repaint=repaint, layout=layout, recompose=recompose)

    def on_resize(self) -> None:
        """Draw anew at the new size."""
        self.refresh()

    def notify_style_update(self) -> None:
        """Draw anew in the new theme."""
        super().notify_style_update()
        self.forget()

    def render_line(self, y: int) -> Strip:
        """Return a line, drawn once."""
        if self._kept_size != self.size:
            self.forget()
            self._kept_size = self.size
        if self._kept is not None and y in self._kept:
            return self._kept[y]
        strip = self.draw_line(y)
        if self._kept is None:  # also where drawing found out that all is to be drawn anew
            self._kept = {}
        self._kept[y] = strip
        return strip


class DrawnWidget(KeptLines):
    """Is drawn as a whole by `draw`, and handed out line by line."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._strips: list[Strip] | None = None

    def draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        """Return the lines at this size and in this theme."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was drawn."""
        super().forget()
        self._strips = None

    def redraw(self) -> None:
        """Draw anew: there are other values to show."""
        self._strips = None
        self.changed()

    def draw_line(self, y: int) -> Strip:
        """Return one line of the whole."""
        if self._strips is None:
            self._strips = self.draw(self.size.width, self.size.height, self.ink)
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)
