"""`distui monitor`: the live dashboard on a running or finished run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distui.core.errors import UserError
from distui.launcher.remote import remote_and_run, remote_options


@click.command("monitor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[HOST:PORT] [RUN]")
@click.option("--replay", is_flag=True, help="Play the run again, from its beginning; space, arrows, + and - move.")
@click.option("--web", is_flag=True, help="Serve the dashboard to a browser (not available in this version).")
@remote_options
def command(
    names: tuple[str, ...], replay: bool, web: bool, token_file: Path | None, ca: Path | None, plaintext: bool
) -> int:
    """Watch RUN (an id, a unique beginning of one, or a folder); without RUN, the newest. Quitting leaves it alone.

    HOST:PORT watches the daemon of another node, or a head daemon with all nodes' runs.
    """
    for asked, what in ((web, "--web"),):
        if asked:
            raise UserError(
                f"{what} is not available in this version",
                "no code stands behind it yet",
                "distui monitor RUN shows a finished run as it was at its end",
            )
    endpoint, name = remote_and_run(names, token_file, ca, plaintext)
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

    if replay:
        if endpoint is not None:
            raise UserError(
                "--replay plays what lies on this machine",
                "a daemon on another node was named",
                "run it on the node that has the run's folder, or leave out --replay",
            )
        from distui.launcher.replay import Replay

        run = find_run(name, configured_runs_dir())
        run_dashboard(None, run.run_id, recording=Replay(run))
        return 0
    if endpoint is not None:
        from distui.launcher.daemon_client import get_snapshot

        run_dashboard(endpoint, get_snapshot(endpoint, name or "").run.run_id)
        return 0
    run_dashboard(ensure_daemon(), find_run(name, configured_runs_dir()).run_id)
    return 0
