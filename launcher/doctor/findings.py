"""What a check of `distui doctor` returns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (`error`: distui does not run so) or may become so (`warning`)."""

    level: Literal["error", "warning"]
    what: str
    why: str
    fix: str


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.13.0+cpu` gives (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", text.strip(), maxsplit=1)[0]))
