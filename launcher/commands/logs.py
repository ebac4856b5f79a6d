"""`distui logs`: what a rank of a run has printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from distui.core.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from pathlib import Path

POLL_S = 0.1
LAUNCHER = -1


@click.command("logs", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended; Ctrl-C leaves it alone.")
@click.option(
    "--rank", type=click.IntRange(LAUNCHER), default=0, show_default=True, help="Whose log; -1: launch's own."
)
@click.option("-n", "--lines", type=click.IntRange(0), help="Only the last so many lines.")
def command(run: str | None, follow: bool, rank: int, lines: int | None) -> int:
    """Print the log of one rank of RUN (an id or a unique beginning of one); without RUN, of the newest."""
    from distui.core.paths import list_own
    from distui.core.telemetry.harmless import HarmlessStream
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.attached import AttachedJob, agent_of
    from distui.launcher.job.launch import configured_runs_dir
    from distui.launcher.job.plain import LogCopy

    folder = find_run(run, configured_runs_dir())
    path = folder.logs / "launcher.log" if rank == LAUNCHER else folder.rank_log(rank)
    agent = agent_of(folder) if follow else None
    if path.name not in list_own(folder.logs) and agent is None:
        known = sorted(int(name[4:-4]) for name in list_own(folder.logs) if name[4:-4].isdigit())
        have = f"it has logs of ranks {', '.join(map(str, known))}" if known else "none of its ranks has begun"
        raise UserError(f"{folder.run_id} has no log of rank {rank}", have, "name one of its ranks with --rank")
    # A log may be that of a copied run: its colours are shown, and nothing else that a terminal would act on.
    err = HarmlessStream(sys.stderr.buffer) if rank >= 0 else None
    output = LogCopy(path, HarmlessStream(sys.stdout.buffer), _skip(path, lines), err)
    if agent is not None:
        job = AttachedJob(folder, agent)
        while not job.wait(POLL_S):
            output.copy()
    output.copy(last=True)
    output.close()
    return EXIT_OK


def _skip(path: Path, num_lines: int | None) -> int:
    """Return where the last lines of a log begin."""
    from distui.core.paths import open_own

    if num_lines is None:
        return 0
    try:
        with open(open_own(path), "rb") as log:
            kept: list[int] = [0]
            for line in log:
                kept.append(kept[-1] + len(line))
    except FileNotFoundError:
        return 0
    return kept[max(0, len(kept) - 1 - num_lines)]
