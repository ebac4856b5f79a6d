"""`distui monitor`: the live dashboard on a running or finished run."""

from __future__ import annotations

import sys

import click

from distui.core.errors import UserError


@click.command("monitor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, metavar="[RUN]")
@click.option("--replay", is_flag=True, help="Play the run again from its beginning (not available in this version).")
@click.option("--web", is_flag=True, help="Serve the dashboard to a browser (not available in this version).")
def command(runs: tuple[str, ...], replay: bool, web: bool) -> int:
    """Watch RUN (an id, a unique beginning of one, or a folder); without RUN, the newest. Quitting leaves it alone."""
    for asked, what in ((replay, "--replay"), (web, "--web")):
        if asked:
            raise UserError(
                f"{what} is not available in this version",
                "no code stands behind it yet",
                "distui monitor RUN shows a finished run as it was at its end",
            )
    if len(runs) > 1:
        raise UserError(
            f"{len(runs)} names were given",
            "watching several hosts on one dashboard is not available in this version",
            "name one run of this node: distui monitor RUN",
        )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(
            "the dashboard needs a terminal",
            "stdin or stdout is none",
            "distui status [RUN] [--json] prints a snapshot",
        )
    from distui.daemon.runs import find_run
    from distui.daemon.spawn import ensure_daemon
    from distui.launcher.launch import configured_runs_dir
    from distui.tui.monitor.app import run_dashboard

    run = find_run(runs[0] if runs else None, configured_runs_dir())
    run_dashboard(ensure_daemon(), run.run_id)
    return 0
