"""What `distui launch` was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What the user asked for: the target with its arguments, as typed, and settings as `section.key` -> text."""

    target: Sequence[str]
    overrides: Mapping[str, str] = field(default_factory=dict)
    config_path: Path | None = None
    no_tui: bool = False
    face: str | None = None
    """What the script's imports are resolved as: see `distui.launcher.compat.faces`."""
    passes_local_rank: bool = False
    """Whether a script that reads `--local_rank` is given it, as DeepSpeed's launcher does."""
    detach: bool = False
    """Whether it starts in the background."""
    debug_rank: int | None = None
    """Whose `breakpoint()` waits for `distui attach --debug`; None: rank 0's has the launcher's stdin."""
    debugger: str = "pdb"
    include: str = ""
    exclude: str = ""
    """Which of the hosts and slots are taken, as `host[:slot,...][@...]`."""
    dry_run: bool = False
    """Whether the batch script is printed instead of being submitted."""
