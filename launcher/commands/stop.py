"""`distui stop`: end a job of this node, whoever started it."""

from __future__ import annotations

import click

from distui.core.errors import EXIT_BUG, EXIT_OK, UserError


@click.command("stop", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.option("--now", is_flag=True, help="Kill at once, without the 3 s in which ranks may end by themselves.")
def command(run: str, now: bool) -> int:
    """End the job of RUN (an id or a unique beginning of one) and wait until it has ended.

    Its ranks get SIGTERM, and SIGKILL after 3 s. To have a checkpoint first: distui control RUN checkpoint.
    """
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.attached import AttachedJob, agent_of
    from distui.launcher.job.launch import configured_runs_dir
    from distui.launcher.job.outcome import read_outcome

    folder = find_run(run, configured_runs_dir())
    if (outcome := read_outcome(folder)) is not None:
        raise UserError(f"{folder.run_id} has ended", f"it is {outcome.state}", "distui runs names those that run")
    if (agent := agent_of(folder)) is None:
        raise UserError(
            f"{folder.run_id} does not run here",
            "no process of this machine holds its ranks",
            "run this on the machine that it was launched on",
        )
    job = AttachedJob(folder, agent)
    job.stop()
    if now:
        job.stop()
    outcome = job.stopped()
    click.echo(f"{folder.run_id}: {outcome.state if outcome else 'its processes are gone'}")
    return EXIT_OK if outcome is not None or now else EXIT_BUG
