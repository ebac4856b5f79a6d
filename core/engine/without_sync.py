"""`no_sync`: backward passes that keep their gradients on this rank, and nothing that steps in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from distui.core.errors import UserError


class Synced(Protocol):
    """What of an engine is asked."""

    sync_gradients: bool
    inside_no_sync: int
    sync_outside: bool

    def _set_sync(self, sync: bool) -> None: ...


@contextmanager
def without_sync(engine: Synced) -> Iterator[None]:
    """Keep gradients local inside, until the last of those that were entered is left, in whatever order."""
    if not engine.inside_no_sync:
        engine.sync_outside = engine.sync_gradients
        engine._set_sync(False)
    engine.inside_no_sync += 1
    try:
        yield
    finally:
        engine.inside_no_sync -= 1
        if not engine.inside_no_sync:
            engine._set_sync(engine.sync_outside)


def step_allowed(engine: Synced, what: str = "optimizer.step()") -> bool:
    """Tell whether the optimizer steps now: not while gradients accumulate. Raises: UserError inside `no_sync`."""
    if engine.inside_no_sync:
        raise UserError(
            f"{what} inside engine.no_sync",
            "the gradients there are this rank's alone: weights stepped by them would differ over ranks",
            "call it after the with block, or let `with engine.accumulate(model):` say which steps are real",
        )
    return engine.sync_gradients


def zeroing_allowed(engine: Synced) -> bool:
    """Tell whether `zero_grad` forgets the gradients: not in the midst of those that accumulate by a count."""
    return engine.sync_outside if engine.inside_no_sync else engine.sync_gradients
