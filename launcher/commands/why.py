"""`distui why`: where the time of a run's steps goes, and what to do about it."""

from __future__ import annotations

import time

import click

from distui.core.errors import UserError


@click.command("why", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False)
@click.option("--what-if", "changes", metavar="KEY=VALUE", multiple=True, help="Predict the step with this setting.")
@click.option("--model", "model_text", metavar="M", help="For --what-if: the model, where the run does not name it.")
def command(run: str | None, changes: tuple[str, ...], model_text: str | None) -> None:
    """Tell where a step's time goes in RUN (without it the newest), in order of cost, each with a remedy and its gain.

    The gain is the most that the remedy can give. --what-if scales the planner's prediction by what was measured.
    """
    from distui.core.config.schema import Config
    from distui.core.config.settings import load
    from distui.core.paths import list_own
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.launch import configured_runs_dir
    from distui.launcher.report.data import read_report
    from distui.launcher.report.why import costs_of
    from distui.tui.format import seconds

    folder = find_run(run, configured_runs_dir())
    config = load(folder.config, {}, environ={}).config if folder.config.name in list_own(folder.path) else Config()
    report = read_report(folder, time.time())
    step_s, costs = costs_of(report.steps, config)
    click.echo(f"{folder.run_id}: {seconds(step_s)} a step, {report.snapshot.run.strategy}")
    for cost in costs:
        gain = "" if cost.name in ("forward", "backward") else f" (at most {cost.gain:.2f}x)"
        click.echo(f"  {cost.share:4.0%}  {seconds(cost.mean_s):>8}  {cost.name}: {cost.remedy}{gain}")
    if changes:
        _predict(config, changes, model_text or config.run.model, report.snapshot.run.world_size, step_s)


def _predict(config: object, changes: tuple[str, ...], model_text: str, world_size: int, step_s: float) -> None:
    from distui.core.config.schema import Config
    from distui.core.hardware.detect import detect, parse_hardware
    from distui.core.plan.models import load_model
    from distui.launcher.report.why import changed_config, what_if
    from distui.tui.format import num_bytes, seconds

    assert isinstance(config, Config)
    then = changed_config(config, changes)
    if not model_text or ".py:" in model_text:
        raise UserError("the model is not known", "run.model was not set in this run", "name it with --model llama-7b")
    hardware = parse_hardware(config.run.hardware) if config.run.hardware else detect()
    before, after = what_if(config, then, load_model(model_text), hardware, world_size, step_s)
    if before is not None and before.step_s:
        click.echo(
            f"the planner's ideal is {seconds(before.step_s)} a step; measured is {step_s / before.step_s:.2f}x of it"
        )
    if after is None:
        click.echo(f"{', '.join(changes)}: n/a, this backend or optimizer is not planned")
        return
    plan = after.plan
    changed = f"with {', '.join(changes)}"
    if after.step_s is None:
        click.echo(f"{changed}: {plan.why}")
        return
    fits = "" if plan.fits else f"; does not fit: {plan.why}"
    memory = f"{num_bytes(plan.memory_per_rank_bytes)} of {num_bytes(plan.memory_limit_bytes)} a rank"
    click.echo(f"{changed}: {seconds(after.step_s)} a step, {step_s / after.step_s:.2f}x, {memory}{fits}")
