"""View 7: what each rank has printed."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widget import Widget

from distui.tui.monitor.log_tail import LogTail
from distui.tui.monitor.views.base import Frame, Key, Panel, View

LAUNCHER = -1


class LogsView(View):
    """One rank's log; [ and ] go to the neighbours."""

    TITLE = "Logs"
    KEYS = (
        Key("[  ]", "log of the previous or next rank; before rank 0 comes the launcher's"),
        Key("f", "follow the end, or stay where you are"),
        Key("↑ ↓ PgUp PgDn", "scroll back; earlier lines are fetched at the top"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "rank(-1)", "Previous", key_display="["),
        Binding("right_square_bracket", "rank(1)", "Next", key_display="]"),
        Binding("f", "follow", "Follow"),
    ]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rank = 0
        self._frame: Frame | None = None

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Panel("log", id="logs-panel"):
            yield LogTail(id="logs-log")

    def show(self, frame: Frame) -> None:
        """Draw the frame: read what is new, unless the view is frozen."""
        self._frame = frame
        log = self.query_one(LogTail)
        log.follow(self.rank)
        if not frame.frozen:
            log.poll(frame.read_log)
        who = "the launcher" if self.rank == LAUNCHER else f"rank {self.rank}"
        state = "paused" if frame.frozen else "following" if log.following else "scrolled back, f follows"
        self.query_one(Panel).tell(f"log of {who}", f"{log.told}, {state}")

    def action_rank(self, by: int) -> None:
        """Show the log of the rank before or after this one."""
        size = max(1, self._frame.model.run.world_size if self._frame else 1)
        self.rank = (self.rank + 1 + by) % (size + 1) - 1
        if self._frame is not None:
            self.show(self._frame)

    def action_follow(self) -> None:
        """Follow the end, or stop."""
        log = self.query_one(LogTail)
        if log.following:
            log.following = False
        else:
            log.action_bottom()
        if self._frame is not None:
            self.show(self._frame)

    def main_widget(self) -> Widget:
        """The log takes the keys."""
        return self.query_one(LogTail)
