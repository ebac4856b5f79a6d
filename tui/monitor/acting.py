"""What the dashboard does beside showing: it moves a recording, acts on the job, and writes what is shown to files."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.app import SuspendNotSupported, SystemCommand
from textual.binding import Binding, BindingType

from distui.core.errors import UserError
from distui.proto import telemetry_pb2 as pb
from distui.tui.client import Source
from distui.tui.monitor.as_text import COPIED_LINES, page, troubles
from distui.tui.monitor.control import VERBS, ControlScreen, RepliesScreen, Verb
from distui.tui.monitor.dialogs import StopScreen
from distui.tui.monitor.export import shown_table, steps_csv, table_csv
from distui.tui.monitor.log_tail import LogTail
from distui.tui.monitor.model import RunModel
from distui.tui.monitor.player import REPLAY_BINDINGS, PlaceScreen, Player, move, parse_place
from distui.tui.monitor.rank_screen import RankScreen
from distui.tui.monitor.views.base import Frame, View
from distui.tui.terminal import TerminalApp
from distui.tui.widgets.commands import open_commands


class ActingApp(TerminalApp[str]):
    """The actions; what is shown is up to who inherits."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "control", "Control"),
        Binding("e", "export", "CSV", show=False),
        Binding("E", "picture", "SVG", show=False),
        Binding("y", "copy", "Copy", show=False),
        Binding("o", "open", "Pager", show=False),
        *REPLAY_BINDINGS,
    ]

    model: RunModel
    client: Source | None
    player: Player | None

    def shown(self) -> tuple[View, Frame]:
        """Return the view in sight and what it shows."""
        raise NotImplementedError

    def action_replay(self, how: str) -> None:
        """Move through a recording."""
        if self.player is None:
            return
        if how != "ask":
            move(self.player, how)
            return
        player, history = self.player, self.model.history
        steps = list(zip(history.column("step"), history.column("time_s"), strict=True))

        def go(to_s: float | None) -> None:
            if to_s is not None:
                player.seek(to_s)

        self.push_screen(PlaceScreen(lambda text: parse_place(text, player, steps)), go)

    def action_command_palette(self) -> None:
        """Open the palette."""
        open_commands(self)

    def action_control(self) -> None:
        """Offer what the job can be asked to do."""
        if not self.screen.is_modal:
            self.push_screen(ControlScreen(self._refusal()), self.ask)

    def _refusal(self) -> str:
        """Return why nothing can be asked of the job; "" where it can. What a daemon refuses, it says itself."""
        if self.player is not None:
            return "this is a recording; distui monitor RUN shows the run itself"
        if self.client is None or self.model.snapshot is None:
            return "nothing is known of the run yet"
        if self.model.ended:
            return f"the run has ended: it is {self.model.state}"
        if self.client.away_since_s is not None:
            return "the daemon is away"
        return ""

    def ask(self, verb: Verb | None) -> None:
        """Ask the job and show what the ranks answer; before it is stopped, ask the user."""
        if verb is None:
            return
        if refusal := self._refusal():
            self.push_screen(ControlScreen(refusal))
        elif verb.verb == "stop":
            self.push_screen(StopScreen(), lambda answer: self._show_replies(verb) if answer else None)
        else:
            self._show_replies(verb)

    def _show_replies(self, verb: Verb) -> None:
        self.push_screen(RepliesScreen(verb, self._execute))

    async def _execute(self, verb: Verb) -> AsyncIterator[pb.ControlReply]:
        assert self.client is not None
        async for reply in self.client.execute(self.model.run_id, verb.verb, dict(verb.arguments)):
            yield reply

    def action_export(self) -> None:
        """Write the table that is shown, or the steps in sight, as CSV into the working directory."""
        view, frame = self.shown()
        table = shown_table(view, self.focused)
        text = table_csv(table) if table is not None else steps_csv(frame)
        name = table.id if table is not None and table.id else "steps"
        self.deliver_text(
            io.StringIO(text),
            save_directory=Path.cwd(),
            save_filename=self._file_name(name, "csv"),
            mime_type="text/csv",
        )

    def action_picture(self) -> None:
        """Write the screen as an SVG into the working directory."""
        view, _ = self.shown()
        picture = io.StringIO(self.export_screenshot(title=f"distui monitor {self.model.run_id}"))
        name = self._file_name(view.TITLE.lower(), "svg")
        self.deliver_text(picture, save_directory=Path.cwd(), save_filename=name, mime_type="image/svg+xml")

    def _as_text(self) -> list[str]:
        """Return the lines of the log in sight; where there is none, what is wrong with the run."""
        view, frame = self.shown()
        place = self.screen if isinstance(self.screen, RankScreen) else view
        for log in place.query(LogTail):
            return log.lines
        return troubles(frame.model, frame.now_s).splitlines()

    def action_copy(self) -> None:
        """Copy the log in sight, or what is wrong, into the clipboard of the terminal."""
        lines = self._as_text()[-COPIED_LINES:]
        self.copy_to_clipboard("\n".join(lines))
        self.notify(f"{len(lines):,} line{'s' * (len(lines) != 1)}, by OSC 52", title="copied", markup=False)

    def action_open(self) -> None:
        """Open the log in sight, or what is wrong, in the user's pager."""
        text = "\n".join(self._as_text()) + "\n"
        try:
            with self.suspend():
                page(text)
        except (SuspendNotSupported, UserError) as error:
            why = error if isinstance(error, UserError) else "this screen is not on a terminal that it could give up"
            self.notify(str(why), title="not opened", severity="error", markup=False)

    def _file_name(self, what: str, ending: str) -> str:
        return f"{self.model.run_id or 'run'}-{what}-{time.strftime('%H%M%S')}.{ending}"

    def on_delivery_complete(self, event: events.DeliveryComplete) -> None:
        """Say where the file is."""
        if event.path is not None:
            self.notify(str(event.path), title="written", markup=False)

    def on_delivery_failed(self, event: events.DeliveryFailed) -> None:
        """Say why there is no file."""
        self.notify(str(event.exception), title="not written", severity="error", markup=False)

    def acting_commands(self) -> Iterable[SystemCommand]:
        """Offer the verbs and the files in the command palette."""
        for verb in VERBS if self.player is None else ():
            yield SystemCommand(f"Job: {verb.title}", verb.what.capitalize(), lambda verb=verb: self.ask(verb))
        yield SystemCommand("Export the table", "CSV, into the working directory", self.action_export)
        yield SystemCommand("Export the picture", "SVG, into the working directory", self.action_picture)
        yield SystemCommand("Copy the log or the errors", "into the terminal's clipboard", self.action_copy)
        yield SystemCommand("Open the log or the errors", "in $PAGER", self.action_open)
