"""What an app does when its terminal goes away."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from distui.core.errors import EXIT_OK


@contextmanager
def ends_with_terminal(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """End this process with its terminal inside, after `before`, also where nohup has the hangup ignored.

    An app would read on for ever from a terminal that is gone. Main thread only.
    """
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        yield
        return

    def leave(*_: object) -> None:
        before()
        os._exit(EXIT_OK)

    signal.signal(signal.SIGHUP, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
