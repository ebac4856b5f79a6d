"""`distui monitor`: the live dashboard on a running or finished run."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from distui.core.errors import UserError
from distui.launcher.cluster.remote import remote_and_run, remote_options


@click.command("monitor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[HOST:PORT] [RUN]")
@click.option("--replay", is_flag=True, help="Play the run again, from its beginning; space, arrows, + and - move.")
@click.option("--web", is_flag=True, help="Serve the dashboard to a browser, on 127.0.0.1 only; prints the address.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of --web; a free one by default.")
@click.option("--served-by", type=int, hidden=True, help="Pid of the server of --web that this process draws for.")
@remote_options
def command(
    names: tuple[str, ...],
    replay: bool,
    web: bool,
    port: int | None,
    served_by: int | None,
    token_file: Path | None,
    ca: Path | None,
    plaintext: bool,
) -> int:
    """Watch RUN (an id, a unique beginning of one, or ./a/folder); without RUN, the newest. Quitting leaves it alone.

    HOST:PORT watches the daemon of another node, or a head daemon with all nodes' runs.
    """
    if port is not None and not web:
        raise UserError("--port without --web", "it is the port that a browser connects to", "add --web")
    endpoint, name = remote_and_run(names, token_file, ca, plaintext)
    if web and find_spec("textual_serve") is None:
        raise UserError("--web needs textual-serve", "it is not installed", "pip install distui[web]")
    if served_by is not None:
        from distui.launcher.job.processes import die_with_parent

        die_with_parent(served_by, signal.SIGKILL)  # it has nothing to save
    elif not (web or (sys.stdin.isatty() and sys.stdout.isatty())):
        raise UserError(
            "the dashboard needs a terminal",
            "stdin or stdout is none",
            "distui status [RUN] [--json] prints a snapshot; --web serves it to a browser",
        )
    if replay and endpoint is not None:
        raise UserError(
            "--replay plays what lies on this machine",
            "a daemon on another node was named",
            "run it on the node that has the run's folder, or leave out --replay",
        )
    if endpoint is not None:
        from distui.launcher.job.daemon_client import get_snapshot

        run_id = get_snapshot(endpoint, name or "").run.run_id
        if web:
            options = (("--token-file", token_file), ("--ca", ca))
            given = [part for option, path in options if path for part in (option, str(path))]
            _serve([*names, *([] if name else [run_id]), *given, *(["--plaintext"] if plaintext else [])], run_id, port)
            return 0
        from distui.tui.monitor.app import run_dashboard

        run_dashboard(endpoint, run_id)
        return 0
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.launch import configured_runs_dir

    run = find_run(name, configured_runs_dir())
    if web:
        _serve([str(run.path.absolute()), *(["--replay"] if replay else [])], run.run_id, port)
        return 0
    from distui.tui.monitor.app import run_dashboard

    if replay:
        from distui.launcher.report.replay import Replay

        run_dashboard(None, run.run_id, recording=Replay(run))
        return 0
    from distui.daemon.node.spawn import ensure_daemon

    run_dashboard(ensure_daemon(), run.run_id)
    return 0


def _serve(arguments: list[str], run_id: str, port: int | None) -> None:
    """Print the address and serve the dashboard there until Ctrl-C."""
    from distui.launcher.web.server import DashboardServer, dashboard_command, listen, tunnel_hint

    with listen(port or 0) as listening:
        server = DashboardServer(dashboard_command(arguments), listening, f"distui {run_id}")
        print(server.url)
        print("Whoever has this address sees the run, and acts on it where telemetry.control allows. Ctrl-C ends.")
        if (hint := tunnel_hint(server.port)) is not None:
            print(hint)
        sys.stdout.flush()
        server.run()
