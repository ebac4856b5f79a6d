"""Errors that a user reads, and how they are told.

    DistuiError
    ├── UserError          the user's mistake: what, why, fix; exit status 2
    │   └── ConfigError    every problem of a configuration at once
    ├── RankFailed         a rank ended badly; exit status 3
    └── DaemonUnavailable  no daemon answers and none could be started

    PermissionError
    └── NotOwn             a part of a run that does not count; told as the user's mistake

Anything else that escapes is a bug in distui: exit status 1.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RANK_FAILED = 3
EXIT_PREEMPTED = 75
"""Gave way and saved: start it again, and it goes on (EX_TEMPFAIL, which schedulers take for `requeue`)."""
EXIT_INTERRUPTED = 130
"""The shell's convention for a job that Ctrl-C ended."""


class DistuiError(Exception):
    """Base of all errors that distui raises on purpose."""

    exit_status = EXIT_BUG


class UserError(DistuiError):
    """The user's mistake, told in three lines: what is wrong, why, and what to do."""

    exit_status = EXIT_USER

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.fix = what, why, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the three parts, so that the error can come from another process."""
        return type(self), (self.what, self.why, self.fix)

    def report(self) -> str:
        """Return the three lines for stderr."""
        return f"error: {self.what}\n  why: {self.why}\n  fix: {self.fix}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration: where (`section.key`), what and why in numbers, and a fix."""

    path: str
    what: str
    why: str
    fix: str

    def report(self) -> str:
        """Return the three lines for stderr."""
        return f"error: {self.path}: {self.what}\n  why: {self.why}\n  fix: {self.fix}"


class ConfigError(UserError):
    """A configuration that cannot run; holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        super().__init__(f"{first.path}: {first.what}", first.why, first.fix)
        self.problems = list(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the problems."""
        return type(self), (self.problems,)

    def report(self) -> str:
        """Return three lines a problem."""
        return "\n".join(problem.report() for problem in self.problems)


class RankFailed(DistuiError):
    """A rank raised, was killed, or exited with a status other than 0."""

    exit_status = EXIT_RANK_FAILED

    def __init__(self, message: str, rank: int | None = None) -> None:
        """`rank` is the first that failed, where it is known."""
        super().__init__(message)
        self.rank = rank


class DaemonUnavailable(DistuiError):
    """No daemon answers on the socket and none could be started."""


class NotOwn(PermissionError):
    """A part of a run that does not count: not this user's, open to others' writing, a link, or no plain file."""

    def __init__(self, path: os.PathLike[str] | str, why: str) -> None:
        super().__init__(errno.EPERM, why, os.fspath(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path and reason, so that the error can come from another process."""
        return type(self), (self.filename, self.strerror)

    def told(self) -> UserError:
        """Return the error as users read it."""
        return UserError(
            f"{self.filename} is not yours alone",
            str(self.strerror),
            "a run is kept in a folder that you own and nobody else can write to: cp -r makes one of another user's, "
            "and run.dir or DISTUI_STATE_DIR names a place for new ones",
        )
