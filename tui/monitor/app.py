"""The live dashboard.

    MonitorClient.watch ──one worker──> RunModel ──one timer, 2 to 4 Hz──> the view in sight

The worker never touches a widget, and no sample is a message: a job of 1,000 ranks repaints as often as one of 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, Protocol

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Input

from distui.core.telemetry.endpoint import Endpoint
from distui.proto import telemetry_pb2 as pb
from distui.tui.client import MonitorClient, Source
from distui.tui.monitor.acting import ActingApp
from distui.tui.monitor.dialogs import HelpScreen, StopScreen
from distui.tui.monitor.header import RunLine, Tabs, VerdictLine
from distui.tui.monitor.model import QUIET_KINDS, RunModel
from distui.tui.monitor.player import Player, PlayerBar
from distui.tui.monitor.rank_screen import RankScreen
from distui.tui.monitor.verdict import judge
from distui.tui.monitor.views.base import Frame, View
from distui.tui.monitor.views.collectives import CollectivesView
from distui.tui.monitor.views.events import EventsView
from distui.tui.monitor.views.logs import LogsView
from distui.tui.monitor.views.loss import LossView
from distui.tui.monitor.views.memory import MemoryView
from distui.tui.monitor.views.overview import OverviewView
from distui.tui.monitor.views.ranks import RanksView
from distui.tui.monitor.views.throughput import ThroughputView
from distui.tui.terminal import on_terminal
from distui.tui.widgets.keys import KeyLine
from distui.tui.widgets.table import LineTable

VIEWS: tuple[type[View], ...] = (
    OverviewView,
    RanksView,
    MemoryView,
    ThroughputView,
    LossView,
    CollectivesView,
    LogsView,
    EventsView,
)
THEMES = ("textual-dark", "textual-light", "nord", "gruvbox", "tokyo-night", "catppuccin-mocha", "solarized-light")
WINDOWS = (None, 1000, 200, 50)
VERDICT_S = 1.5
"""How long the last picture stays when the job has ended."""


class Recording(Source, Player, Protocol):
    """A source that can be moved through."""


class DashboardApp(ActingApp):
    """One run on the screen. Ends with "quit", "stop" or "ended"."""

    CSS_PATH = Path(__file__).with_name("dashboard.tcss")
    TITLE = "distui"
    ENABLE_COMMAND_PALETTE = True
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (34, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"view({number - 1})", view.TITLE, show=False) for number, view in enumerate(VIEWS, 1)),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("p", "pause", "Pause"),
        Binding("left", "travel(-1)", "Back in time", show=False),
        Binding("right", "travel(1)", "Forward in time", show=False),
        Binding("w", "window", "Window", show=False),
        Binding("t", "theme", "Theme", show=False),
        Binding("k", "keep", "Keep", show=False, priority=True),
        Binding("q", "leave", "Quit"),
        Binding("ctrl+q", "leave", "Quit", show=False, priority=True),
        Binding("ctrl+c", "interrupt", "Stop", show=False, priority=True),
    ]

    def __init__(
        self,
        run_id: str,
        *,
        socket: Path | Endpoint | None = None,
        recording: Recording | None = None,
        follow_job: Callable[[], int | None] | None = None,
        on_stop: Callable[[], None] | None = None,
        refresh_hz: float = 2.0,
        theme: str = THEMES[0],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Watch a daemon, or play a recording."""
        super().__init__()
        self.model = RunModel(run_id)
        self.client = recording
        self.player = recording
        self._run_id, self._socket, self._clock = run_id, socket, clock
        self._follow_job, self._on_stop, self._refresh_s = follow_job, on_stop, 1.0 / refresh_hz
        self._frozen: RunModel | None = None
        self._end_step: int | None = None
        self._window = 0
        self._drawn: object = None
        self._ended_s: float | None = None
        self._keep = False
        self.theme = theme if theme in self.available_themes else THEMES[0]

    def compose(self) -> ComposeResult:
        """Make the parts."""
        yield RunLine(id="run")
        yield VerdictLine(id="verdict")
        if self.player is not None:
            yield PlayerBar(self.player, id="player")
        yield Tabs([view.TITLE for view in VIEWS], id="tabs")
        with ContentSwitcher(initial=_id(VIEWS[0]), id="views"):
            for view in VIEWS:
                yield view(id=_id(view))
        yield KeyLine()

    def on_mount(self) -> None:
        """Begin to watch and to draw."""
        if self._socket is not None:
            self.client = MonitorClient(self._socket, self._clock)
        if self.client is not None:
            self.run_worker(self._fill(self.client), group="watch")
        self.set_interval(self._refresh_s, self.tick)
        self.action_view(0)

    async def on_unmount(self) -> None:
        """End the calls to the daemon."""
        if self.client is not None:
            await self.client.close()

    async def _fill(self, client: Source) -> None:
        epoch = 0
        async for update in client.watch(self._run_id, self._refresh_s):
            if self.player is not None and self.player.epoch != epoch:
                # The cursor went back: what was shown has not happened yet.
                epoch, self.model = self.player.epoch, RunModel(self._run_id)
            self.model.apply(update, self._clock())
            if self.player is not None:
                self._draw()  # a seek is answered at once

    def tick(self) -> None:
        """Redraw what is in sight, and see whether the job has ended."""
        self._draw()
        self.search_garbage()
        if self._follow_job is None or self._keep:
            return
        if self._ended_s is None:
            if self._follow_job() is not None:
                self._ended_s = self._clock()
                self.notify("the job has ended; k keeps the dashboard open", timeout=VERDICT_S)
        elif self._clock() - self._ended_s >= VERDICT_S:
            self.exit("ended")

    def _draw(self, force: bool = False) -> None:
        shown = self._frozen or self.model
        # In a recording the time is the cursor's.
        now_s = self._clock() if self.player is None else shown.received_s
        away = self.client.away_since_s if self.client is not None else None
        problem = self.client.problem if self.client is not None else ""
        # Only the base screen has these; a screen above it may be the active one.
        base = self.screen_stack[0] if self.screen_stack else None
        try:
            line = base.query_one(RunLine) if base is not None else None
        except NoMatches:
            line = None
        if base is None or line is None:
            return  # a last tick while the app closes
        line.show(shown, now_s, None if away is None else now_s - away, self._pause_text())
        verdict = judge(self.model, now_s, problem, daemon_away=away is not None)
        base.query_one(VerdictLine).show(verdict, shown.run.strategy)
        if self.player is not None:
            told = [event for event in shown.events if event.event.kind not in QUIET_KINDS]
            base.query_one(PlayerBar).show([(event.time_s, int(event.event.level)) for event in told])
        top = self.screen
        target = top if isinstance(top, RankScreen) else self._view if top is base else None
        if target is None or not target.is_mounted:
            return  # opened in this moment: its parts are not all there yet
        # A rank's log and how long it is in a phase go on while nothing else is new.
        moves = isinstance(target, RankScreen | LogsView | RanksView | OverviewView | CollectivesView)
        key = (target, shown, shown.version, self._window, self._end_step, int(now_s) if moves else 0)
        if not force and key == self._drawn and not isinstance(target, RankScreen | LogsView):
            return
        self._drawn = key
        if isinstance(self.client, MonitorClient):
            self.client.node = shown.host(target.rank) if shown.hosts and isinstance(target, RankScreen) else ""
        target.show(self._frame(shown, now_s))

    def _frame(self, shown: RunModel, now_s: float) -> Frame:
        read_log = None
        if (client := self.client) is not None:

            async def read_log(rank: int, offset: int, max_bytes: int) -> pb.ReadLogResponse:
                return await client.read_log(self.model.run_id, rank, offset, max_bytes)

        frozen = self._frozen is not None
        time_s = shown.received_s if frozen else now_s
        return Frame(shown, time_s, WINDOWS[self._window], self._end_step, frozen, read_log)

    def _pause_text(self) -> str:
        if self._frozen is None:
            return ""
        return "❚❚ paused" + (f" at step {self._end_step:,}" if self._end_step is not None else "")

    @property
    def _view(self) -> View:
        switcher = self.screen_stack[0].query_one("#views", ContentSwitcher)
        return switcher.get_child_by_id(switcher.current or _id(VIEWS[0]), View)

    def action_view(self, index: int) -> None:
        """Open a view."""
        while len(self.screen_stack) > 1 and isinstance(self.screen, RankScreen):
            self.pop_screen()
        base = self.screen_stack[0]
        base.query_one("#views", ContentSwitcher).current = _id(VIEWS[index])
        base.query_one(Tabs).choose(index)
        view = self._view
        if (widget := view.main_widget()) is not None:
            widget.focus()
        else:
            view.screen.set_focus(None)
        if view.size:
            self._draw(True)  # opened before: what is painted first is already new
        # Sizes are known after the layout.
        self.call_after_refresh(self._draw, True)

    @on(Tabs.Chosen)
    def _tab_chosen(self, event: Tabs.Chosen) -> None:
        self.action_view(event.index)

    @on(LineTable.Selected, "#ranks-table")
    @on(LineTable.Selected, "#overview-table")
    async def _open_rank(self, event: LineTable.Selected) -> None:
        if isinstance(event.key, int) and len(self.screen_stack) == 1:
            await self.push_screen(RankScreen(event.key), lambda _: self._draw(True))
            self.call_after_refresh(self._draw, True)

    def action_help(self) -> None:
        """Show the keys."""
        if not isinstance(self.screen, HelpScreen):
            view = self._view
            self.push_screen(HelpScreen(view.TITLE.lower(), view.KEYS, self.player is not None))

    def shown(self) -> tuple[View, Frame]:
        """Return the view in sight and what it shows."""
        shown = self._frozen or self.model
        return self._view, self._frame(shown, self._clock() if self.player is None else shown.received_s)

    def action_pause(self) -> None:
        """Freeze the picture, or go on; data keeps arriving."""
        self._frozen = self.model.freeze() if self._frozen is None else None
        self._end_step = None
        self._draw(True)

    def action_travel(self, by: int) -> None:
        """Go back or forward through the steps by a quarter of the window; pauses."""
        if self._frozen is None:
            if by > 0:
                return
            self._frozen = self.model.freeze()
        steps = self._frozen.history.column("step")
        if not steps:
            return
        first, last = int(steps[0]), int(steps[-1])
        stride = max(1, (WINDOWS[self._window] or last - first) // 4)
        end = (self._end_step if self._end_step is not None else last) + by * stride
        self._end_step = None if end >= last else max(end, min(last, first + 1))
        self._draw(True)

    def action_window(self) -> None:
        """Show fewer of the newest steps, or all."""
        self._window = (self._window + 1) % len(WINDOWS)
        size = WINDOWS[self._window]
        self.notify("all steps" if size is None else f"{size:,} steps", title="in sight", timeout=1.5)
        self._draw(True)

    def action_theme(self) -> None:
        """Take the next theme."""
        place = THEMES.index(self.theme) if self.theme in THEMES else -1
        self.theme = THEMES[(place + 1) % len(THEMES)]
        self.notify(self.theme, title="theme", timeout=1.5)
        self.call_after_refresh(self._draw, True)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave `k` to the tables until there is something to keep, and the player's keys to who writes or asks."""
        if action == "keep":
            return self._ended_s is not None
        if action in ("pause", "control") and self.player is not None:
            return False  # the space bar pauses a recording, and it cannot be asked for anything
        if action == "replay":
            return self.player is not None and not isinstance(self.focused, Input) and not self.screen.is_modal
        return super().check_action(action, parameters)

    def action_keep(self) -> None:
        """Stay open when the job has ended."""
        self._keep = True

    def action_leave(self) -> None:
        """Quit; the job goes on."""
        self.exit("ended" if self._ended_s is not None else "quit")

    def action_interrupt(self) -> None:
        """Ask whether to stop the job, where it is ours; quit otherwise."""
        if isinstance(self.screen, StopScreen):
            self.screen.action_answer(True)
        elif self._follow_job is None or self._ended_s is not None:
            self.action_leave()
        else:
            self.push_screen(StopScreen(), self._stop)

    def _stop(self, answer: bool | None) -> None:
        if answer:
            if self._on_stop is not None:
                self._on_stop()
            self.exit("stop")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Offer the views and keys in the command palette, then Textual's own commands."""
        for index, view in enumerate(VIEWS):
            what = (view.__doc__ or "").splitlines()[0]
            yield SystemCommand(f"{index + 1} {view.TITLE}", what, lambda index=index: self.action_view(index))
        if self.player is None:
            yield SystemCommand("Pause or go on", "Freeze the picture; data keeps arriving", self.action_pause)
        yield from self.acting_commands()
        yield SystemCommand("Steps in sight", "All, 1,000, 200 or 50", self.action_window)
        for command in super().get_system_commands(screen):
            if command.title not in ("Quit", "Keys", "Screenshot"):
                yield command
        yield SystemCommand("Quit", "The job goes on", self.action_leave)


def _id(view: type[View]) -> str:
    return f"view-{view.TITLE.lower()}"


def run_dashboard(
    socket: Path | Endpoint | None,
    run_id: str,
    *,
    recording: Recording | None = None,
    follow_job: Callable[[], int | None] | None = None,
    on_stop: Callable[[], None] | None = None,
    on_lost: Callable[[], None] = lambda: None,
    refresh_hz: float = 2.0,
    theme: str = THEMES[0],
) -> str:
    """Show the run until the user leaves or the job ends; a `recording` is played instead of asking a daemon.

    `follow_job` is polled and returns the job's exit status once it has ended; `on_stop` is called when the user asks
    to stop the job, `on_lost` before this process ends with its terminal under nohup. Returns "quit" (the job goes on),
    "stop" (the user asked to stop it) or "ended". A dashboard that breaks (Textual then prints why) is "quit": it must
    not take the job with it.
    """
    app = DashboardApp(
        run_id,
        socket=socket,
        recording=recording,
        follow_job=follow_job,
        on_stop=on_stop,
        refresh_hz=refresh_hz,
        theme=theme,
    )
    with on_terminal(on_lost):
        return app.run() or "quit"
