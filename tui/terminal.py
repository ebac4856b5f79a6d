"""What both apps do around their run: with the terminal that goes away, and with garbage."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from textual import events
from textual.app import App

from distui.core.errors import EXIT_OK

Result = TypeVar("Result")
_NEVER = 1_000_000
"""How many younger collections come before a full one that Python begins by itself."""


class TerminalApp(App[Result]):
    """An app that looks for garbage while nobody types: a full search would hold up an answer for 0.1 to 0.2 s."""

    IDLE_S = 3.0
    EVERY_S = 30.0
    AT_MOST_S = 300.0
    """A full search is due after EVERY_S; one that AT_MOST_S passed by is made although somebody types."""

    _typed_s = _searched_s = 0.0

    async def on_event(self, event: events.Event) -> None:
        """Note when somebody types, or moves the mouse."""
        if isinstance(event, events.InputEvent):
            self._typed_s = time.monotonic()
        await super().on_event(event)

    def search_garbage(self) -> bool:
        """Search if it is due and Python does not do so itself; call it now and then. Returns whether it did."""
        now_s = time.monotonic()
        self._searched_s = self._searched_s or now_s
        since_s = now_s - self._searched_s
        if gc.get_threshold()[2] != _NEVER or since_s < self.EVERY_S:
            return False
        if now_s - self._typed_s < self.IDLE_S and since_s < self.AT_MOST_S:
            return False
        gc.collect()
        self._searched_s = now_s
        return True


@contextmanager
def on_terminal(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run a TerminalApp inside: it ends with its terminal, after `before`, and searches all garbage itself.

    An app would read on for ever from a terminal that is gone, also where nohup has the hangup ignored. What was
    imported so far is never garbage. Main thread only.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], _NEVER)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def leave(*_: object) -> None:
        before()
        os._exit(EXIT_OK)

    if ignored:
        signal.signal(signal.SIGHUP, leave)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
