"""What nobody expected of the planner or of the detection, as an error that a screen can show."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distui.core.errors import UserError


class UnexpectedError(UserError):
    """A fault of ours, told as the user's errors are."""


@contextmanager
def told_as(what: str, fix: str) -> Iterator[None]:
    """Raise any exception of the block as an `UnexpectedError`, so that no fault of a prediction ends the wizard."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        why = f"{type(error).__name__}: {error} ({where}); the fault is distui's"
        raise UnexpectedError(f"{what} failed", why, fix) from error
