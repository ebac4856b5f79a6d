"""Steps of a Pilot on the dashboard: watch a daemon, wait, read the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from textual.pilot import Pilot
from textual.widgets import ContentSwitcher

from distui.tui.monitor.app import DashboardApp
from distui.tui.monitor.header import VerdictLine

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon

SMALL, LARGE = (80, 24), (160, 50)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Job:
    """A launch's job, as the dashboard sees it."""

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self.num_stops = 0

    def ended(self) -> int | None:
        return self.exit_status

    def stop(self) -> None:
        self.num_stops += 1


def watching(daemon: FakeDaemon, sample: Any, job: Job | None = None, clock: Clock | None = None) -> DashboardApp:
    return DashboardApp(
        sample.RUN_ID,
        socket=daemon.socket,
        follow_job=job.ended if job else None,
        on_stop=job.stop if job else None,
        refresh_hz=10,
        clock=clock or Clock(),
    )


async def until(pilot: Pilot[Any], reached: Callable[[], object]) -> None:
    """Wait for what the screen or the model must come to; pytest's timeout ends it."""
    while not reached():
        await pilot.pause(0.03)
    await pilot.pause()


def screen_text(app: DashboardApp) -> str:
    """Return what a reader sees, line by line."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def known(app: DashboardApp) -> Callable[[], bool]:
    return lambda: app.model.snapshot is not None and "Overview" in screen_text(app)


def verdict(app: DashboardApp) -> str:
    return app.screen_stack[0].query_one(VerdictLine).text


def current(app: DashboardApp) -> str | None:
    return app.screen_stack[0].query_one("#views", ContentSwitcher).current
