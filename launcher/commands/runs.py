"""`distui runs`: the jobs of this user, newest first."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

import click

NUM_SHOWN = 20


@click.command("runs", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--all", "show_all", is_flag=True, help=f"All of them, not the newest {NUM_SHOWN}.")
@click.option("--running", is_flag=True, help="Only those that have not ended.")
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
def command(show_all: bool, running: bool, as_json: bool) -> None:
    """List the runs of this user: state, when they began, how long they lasted, ranks, strategy, command."""
    from distui.daemon.runs.folders import FINAL_STATES, run_folders
    from distui.launcher.job.launch import configured_runs_dir

    folders = run_folders([configured_runs_dir()])
    rows = []
    for folder in folders:
        row = run_row(folder)
        if running and row["state"] in FINAL_STATES:
            continue
        rows.append(row)
        if len(rows) == NUM_SHOWN and not show_all:
            break
    if as_json:
        click.echo(json.dumps({"runs": rows}, indent=1))
        return
    if not rows:
        click.echo("no run" + (" that has not ended" if running and folders else " yet: distui demo shows one"))
        return
    from rich.console import Console
    from rich.table import Table

    from distui.tui.format import duration

    # In a pipe there is no width to fit.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 240
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True, min_width=max(len(row["run"]) for row in rows))
    table.add_column("state", no_wrap=True, min_width=8)
    table.add_column("began", no_wrap=True, min_width=11)
    for heading in ("lasted", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    for heading in ("strategy", "command") if width >= 120 else ("strategy",):
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for row in rows:
        began = time.strftime("%m-%d %H:%M", time.localtime(row["started_s"]))
        words = [row["run"], row["state"], began, duration(row["lasted_s"]), str(row["ranks"]), row["strategy"]]
        table.add_row(*[*words, " ".join(row["command"])][: len(table.columns)])
    Console(highlight=False, markup=False, width=width).print(table)
    if not running and len(folders) > len(rows):
        click.echo(f"{len(folders) - len(rows)} older ones: --all shows them")


def run_row(folder: Any) -> dict[str, Any]:
    """Return what is told of one run; a run without an outcome runs if its agent does, else its telemetry says."""
    from distui.daemon.runs.folders import read_info
    from distui.launcher.job.attached import agent_of

    info = read_info(folder)
    state = info.state
    if not state:
        state = "running" if agent_of(folder) is not None else _told_state(folder)
    ended_s = info.finished_s if info.HasField("finished_s") else time.time() if state == "running" else None
    return {
        "run": info.run_id,
        "state": state,
        "started_s": info.started_s,
        "lasted_s": None if ended_s is None else ended_s - info.started_s,
        "ranks": info.world_size,
        "strategy": info.strategy,
        "command": list(info.command),
    }


def _told_state(folder: Any) -> str:
    from distui.core.errors import DistuiError
    from distui.launcher.job.daemon_client import snapshot_of

    try:
        return str(snapshot_of(folder).run.state)
    except (DistuiError, OSError):  # NotOwn too: one folder that is spoilt does not hide the others
        return "unreadable"
