"""`distui attach`: have a job in the background before you again, as if it had been launched here."""

from __future__ import annotations

import sys

import click

from distui.core.errors import EXIT_OK, UserError


@click.command("attach", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False)
@click.option("--no-tui", is_flag=True, help="Plain lines even in a terminal (also DISTUI_NO_TUI=1).")
@click.option("--debug", is_flag=True, help="Have the debugger of its --debug-rank in this terminal.")
def command(run: str | None, no_tui: bool, debug: bool) -> int:
    """Show the job of RUN (an id or a unique beginning of one; without RUN the newest) until it ends.

    The exit status is the job's. q, or Ctrl-C on plain lines, leaves the job alone; Ctrl-C on the dashboard asks.

    With --debug this terminal is lent to the rank that was launched with --debug-rank, at its breakpoint(): Ctrl-D, or
    the end of the rank, gives it back.
    """
    from distui.core.config.settings import load
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.attached import AttachedJob, agent_of
    from distui.launcher.job.launch import configured_runs_dir, say_detached, start_daemon, wants_screen
    from distui.launcher.job.outcome import read_outcome
    from distui.launcher.job.plain import follow_plain
    from distui.launcher.job.request import LaunchRequest

    folder = find_run(run, configured_runs_dir())
    if debug:
        from distui.launcher.job.debug_socket import attach

        return attach(folder)
    agent = agent_of(folder)
    if agent is None:
        outcome = read_outcome(folder)
        what = f"it is {outcome.state}" if outcome else "no process of this machine holds its ranks"
        raise UserError(f"{folder.run_id} does not run here", what, f"distui monitor {folder.run_id} shows it")
    job, config = AttachedJob(folder, agent), load(folder.config, {}, environ={}).config
    socket, answer = start_daemon(config), ""
    if socket is not None and wants_screen(LaunchRequest((), no_tui=no_tui)):
        from distui.tui.monitor.app import run_dashboard

        answer = run_dashboard(socket, folder.run_id, follow_job=job.ended, on_stop=job.stop)
        if answer == "stop" and job.stopped_by is None:
            job.stop()
    else:
        try:
            follow_plain(job, config, socket, from_now=True)
        except KeyboardInterrupt:
            answer = "quit"
    if answer == "quit":
        say_detached(folder)
        return EXIT_OK
    outcome = job.stopped() if answer == "stop" else read_outcome(folder)
    state = outcome.state if outcome else "its processes are gone"
    print(f"distui: {folder.run_id}: {state}; kept in {folder.path}", file=sys.stderr)
    return outcome.exit_status if outcome else EXIT_OK
