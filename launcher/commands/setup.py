"""`distui setup`: the wizard, or with `--yes` its best answer without a screen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distui.core.errors import EXIT_INTERRUPTED, EXIT_OK, Problem, UserError

if TYPE_CHECKING:
    from distui.tui.setup.model import WizardState
    from distui.tui.setup.planning import Choice


@click.command("setup", short_help="Write a config step by step: hardware, model, strategy, review.")
@click.option("--yes", is_flag=True, help="Take the best strategy without a screen.")
@click.option(
    "--config",
    "config_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    default=Path("distui.toml"),
    help="File to write; ./distui.toml by default.",
)
@click.option("--model", metavar="M", help="Preset, path of a config.json, a size such as 7B, or train.py:build_model.")
@click.option("--hardware", metavar="H", help="Plan for a machine by name, such as 8xA100-40GB.")
@click.option(
    "--from", "import_file", metavar="FILE", type=click.Path(path_type=Path), help="Start from another tool's config."
)
@click.option("--nproc", metavar="N|auto", help="Ranks on each node.")
@click.option("--global-size", metavar="G", help="Samples of one optimizer step over all ranks.")
def command(
    yes: bool,
    config_path: Path,
    model: str | None,
    hardware: str | None,
    import_file: Path | None,
    nproc: str | None,
    global_size: str | None,
) -> int:
    """Find out what this machine has, choose a strategy, and write distui.toml.

    --model also takes FILE.py:FUNCTION, whose model is built on the meta device. With --from the values of a DeepSpeed
    JSON or an Accelerate YAML are preselected, and what could not be carried over is said with the reason.

    An existing file is resumed: its values are the defaults, its comments and order stay, and what it was before is
    kept as distui.toml.bak. Nothing is written before the last step.
    """
    if not yes and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(
            "distui setup needs a terminal",
            "standard input or output is none, so its screens cannot be shown",
            "distui setup --yes takes the best strategy without a screen",
        )
    from distui.launcher.probes.calibrate import calibrate
    from distui.launcher.probes.script_model import load_script_model
    from distui.tui.setup.model import WizardState

    state = WizardState.open(config_path)
    state.models.build_script = load_script_model
    state.calibrate = lambda hardware, num_ranks, watch: calibrate(hardware, num_ranks, watch=watch)
    if import_file is not None:
        from distui.core.config.imports.files import import_file as read
        from distui.tui.setup.changes import take_import

        take_import(state, read(import_file), import_file.name)
    _answer(state, model, hardware, {"cluster.nproc": nproc, "batch.global_size": global_size})
    return _without_screen(state, model is not None) if yes else _with_screen(state)


def _answer(state: WizardState, model: str | None, hardware: str | None, settings: dict[str, str | None]) -> None:
    """Put the command line's answers into the state.

    Raises:
        UserError: one of them is wrong.
    """
    from distui.core.hardware.detect import parse_hardware

    if hardware:
        state.set_hardware(parse_hardware(hardware), hardware)
    if model:
        state.set_model(model)
    for key, text in settings.items():
        if text is not None and (problem := state.set_value(key, text)):
            raise _as_error(problem)
    state.touched = state.imported is not None


def _as_error(problem: Problem) -> UserError:
    return UserError(f"{problem.path}: {problem.what}", problem.why, problem.fix)


def _with_screen(state: WizardState) -> int:
    from distui.tui.setup.app import run_wizard

    result = run_wizard(state)
    if result.written is None:
        print("nothing written", file=sys.stderr)
        return EXIT_INTERRUPTED
    _say_written(state, result.written, result.backup, result.launch)
    if not result.launch:
        return EXIT_OK
    from distui.launcher.job.launch import launch
    from distui.launcher.job.request import LaunchRequest

    return launch(LaunchRequest((result.script,), {}, result.written))


def _without_screen(state: WizardState, is_model_named: bool) -> int:
    """Choose, write, and say what and why; without a model named here an existing file keeps its strategy.

    Raises:
        UserError: no strategy that this version can run fits, or the answers do not go together.
    """
    from distui.core.errors import ConfigError
    from distui.core.hardware.detect import detect

    if state.hardware is None:
        state.set_hardware(detect())
    choice: Choice | None
    kept = state.kept()
    if state.imported is not None and kept is not None:
        # The imported strategy stays, unless it is known not to fit; its prediction is shown where there is one.
        choice = next((each for each in state.choices() if each.is_like(kept)), kept)
        if choice.fits is False:
            raise _does_not_fit(state, choice)
    elif (state.model is None or not is_model_named) and kept is not None:
        choice = kept
    else:
        runs = (choice for choice in state.choices() if choice.available and not choice.is_kept)
        choice = next((choice for choice in runs if choice.fits is not False), None)
    if choice is None:
        raise _nothing_fits(state)
    state.choose(choice)
    if problems := state.problems():
        raise ConfigError(problems)
    diff = state.diff()
    backup = state.write()
    _say_notes(state)
    _say_choice(state)
    _say_written(state, state.path, backup)
    if state.existing is not None:
        print("\n".join(line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")) or "unchanged")
    return EXIT_OK


def _nothing_fits(state: WizardState) -> UserError:
    from distui.tui.format import num_bytes

    plans = [choice.plan for choice in state.choices() if choice.plan is not None and choice.available]
    if not plans:
        return UserError("no strategy can run", "this version has none for this model and hardware", "distui doctor")
    least = min(plans, key=lambda plan: plan.memory_per_rank_bytes)
    model = state.model.name if state.model else "the model"
    hardware = state.hardware.name if state.hardware else "this machine"
    return UserError(
        f"{model} does not fit on {hardware}",
        f"the leanest strategy that can run, {least.name}, needs {num_bytes(least.memory_per_rank_bytes)} a rank, "
        f"and a rank has {num_bytes(least.memory_limit_bytes)}",
        least.smallest_change or "more ranks, shorter samples, or a smaller model; distui plan lists all strategies",
    )


def _does_not_fit(state: WizardState, choice: Choice) -> UserError:
    assert choice.plan is not None
    fix = choice.plan.smallest_change or "leave out --from, or choose another strategy on the screens of distui setup"
    return UserError(f"{choice.name}, as {state.import_name} has it, does not fit", choice.why, fix)


def _say_notes(state: WizardState) -> None:
    """Print what became of the keys of an imported file that are no settings now; the gravest first."""
    if state.imported is None:
        return
    from distui.tui.setup.facts import note_rows

    for words, reasons in note_rows(state.imported):
        print(f"{words}:", file=sys.stderr)
        for reason in reasons:
            print(f"  {reason}", file=sys.stderr)


def _say_choice(state: WizardState) -> None:
    from distui.tui.format import num_bytes, si

    assert state.hardware is not None and state.choice is not None
    choice, plan = state.choice, state.choice.plan
    ranks = state.world_size
    print(f"hardware  {state.hardware.name}, {ranks} rank{'' if ranks == 1 else 's'}")
    print(f"model     {f'{state.model.name} ({state.model.source})' if state.model else 'not named (--model): n/a'}")
    print(f"strategy  {choice.name}")
    if plan is not None:
        limit = num_bytes(plan.memory_limit_bytes)
        print(
            f"predicted {num_bytes(plan.memory_per_rank_bytes)} of {limit} a rank, {si(plan.tokens_per_s, 'tokens/s')}"
            f" with micro-batches of {plan.micro_size}"
        )
    print(f"why       {choice.why}")


def _say_written(state: WizardState, path: Path, backup: Path | None, is_launched: bool = False) -> None:
    from distui.core.config.settings import CONFIG_NAME

    if backup is not None:
        print(f"wrote {path}; its former text is {backup}")
    else:
        print(f"{path} stays as it is" if state.existing is not None else f"wrote {path}")
    if not state.is_this_machine:
        print(f"planned for {state.hardware_text}: launch it there")
    elif not is_launched:
        option = "" if path.name == CONFIG_NAME else f"--config {path} "
        print(f"next: distui launch {option}YOUR_SCRIPT.py")
