"""`distui control`: act on a running job through the daemon, also while its main threads hang."""

from __future__ import annotations

from pathlib import Path

import click

from distui.core.errors import EXIT_BUG, EXIT_OK, UserError

VERBS = ("checkpoint", "stacks", "profile", "stop", "log-level")


@click.command("control", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("verb", type=click.Choice(VERBS))
@click.option("--steps", type=click.IntRange(min=1), help="profile: the next so many steps.")
@click.option("--level", type=click.Choice(["debug", "info", "warning", "error"]), help="log-level: from now on.")
@click.option("--deadline", "deadline_s", type=click.FloatRange(min=0.1), default=30.0, help="Seconds to wait.")
def command(run: str, verb: str, steps: int | None, level: str | None, deadline_s: float) -> int:
    """Have every rank of RUN do VERB, and print what each answers; exit 1 where one could not."""
    from distui.core.telemetry.harmless import harmless
    from distui.daemon.node.spawn import ensure_daemon
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.daemon_client import execute, get_snapshot
    from distui.launcher.job.launch import configured_runs_dir
    from distui.launcher.job.outcome import read_outcome

    folder = find_run(run, configured_runs_dir())
    if (outcome := read_outcome(folder)) is not None:
        raise UserError(f"{folder.run_id} has ended", f"it is {outcome.state}", "distui status names the newest run")
    if (verb == "log-level") != (level is not None):
        raise UserError("log-level and --level belong together", f"{verb} was asked for", "log-level --level info")
    arguments = {"steps": str(steps)} if steps is not None else {}
    if level is not None:
        arguments["level"] = level
    status, daemon = EXIT_OK, ensure_daemon()
    known = get_snapshot(daemon, folder.run_id).run.run_dir
    if Path(known) != folder.path.resolve():
        what = f"the daemon knows {folder.run_id} as {known}"
        raise UserError(what, f"{folder.path} was named", "name the run that is to act by its name alone")
    for reply in execute(daemon, folder.run_id, verb, arguments, deadline_s):
        who = f"rank {reply.rank}" if reply.rank >= 0 else "daemon"
        click.echo(f"{who}: {reply.state}{f': {reply.message}' if reply.message else ''}")
        if reply.payload:
            click.echo(harmless(reply.payload.decode(errors="replace"), lines=True).rstrip())
        if reply.state == "error":
            status = EXIT_BUG
    return status
