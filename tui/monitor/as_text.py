"""What is in sight as text: for the clipboard, and for the user's pager."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess

from distui.core.errors import UserError
from distui.core.telemetry.harmless import harmless
from distui.tui.monitor.model import RunModel
from distui.tui.monitor.verdict import blame, judge

COPIED_LINES = 1000
"""More is a log to be opened, and terminals take no more."""
DEFAULT_PAGER = "less -R -+F"
"""It stays also where a page is enough."""


def troubles(model: RunModel, now_s: float) -> str:
    """Return what the run's state is, and whole what is wrong with it: verdicts, and the ranks' errors."""
    verdict = judge(model, now_s)
    lines = [f"{model.run_id}: {verdict.state}, {verdict.message}"]
    lines += [f"{found.kind}: {blame(found, model)}" for found in model.diagnosis]
    lines += [f"rank {rank.rank} on {rank.node}: {rank.error}" for rank in model.ranks if rank.error]
    return "\n".join(dict.fromkeys(harmless(line) for line in lines))


def page(text: str) -> None:
    """Show the text in $PAGER, on a terminal that is free, until the user leaves it. Raises: UserError without one."""
    command = shlex.split(os.environ.get("PAGER") or DEFAULT_PAGER)
    if not command or shutil.which(command[0]) is None:
        raise UserError(f"the pager {shlex.join(command)!r} cannot be run", "it is not installed", "set PAGER")
    before = signal.signal(signal.SIGINT, _leave_to_the_pager)
    try:
        subprocess.run(command, input=text.encode(), check=False)
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_to_the_pager(*_: object) -> None:
    """Ignore Ctrl-C here: were it ignored by the kernel, the pager would inherit that."""
