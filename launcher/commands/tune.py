"""`distui tune`: the planner's first few plans, each launched for a few steps, and the fastest kept where asked."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distui.core.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from distui.core.plan.types import Plan
    from distui.launcher.job.trial import Trial
    from distui.tui.setup.model import WizardState
    from distui.tui.setup.planning import Choice

Row = tuple["Choice", "Plan | None", "Trial"]


@click.command("tune", context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="MODEL", help="What is planned, as for distui plan; without it the ZeRO stages.")
@click.option("--nproc", metavar="N|auto", help="Ranks on this node.")
@click.option("--plans", type=click.IntRange(1), default=4, show_default=True, help="How many plans are tried.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps that are measured of each.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Steps before these.")
@click.option("--seconds", type=click.FloatRange(1), default=120.0, show_default=True, help="No plan takes longer.")
@click.option("--write", is_flag=True, help="Write the fastest into the settings file; its former text is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting, for all plans.")
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=Path("distui.toml"),
    help="Settings that hold for all plans; ./distui.toml by default.",
)
@click.option("-m", "--module", is_flag=True, help="The target is a module, as with python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str | None,
    nproc: str | None,
    plans: int,
    steps: int,
    warmup: int,
    seconds: float,
    write: bool,
    as_json: bool,
    assignments: tuple[str, ...],
    config_path: Path,
    module: bool,
    script: str,
    args: tuple[str, ...],
) -> int:
    """Launch SCRIPT for a few steps under each of the first plans that run here, and say which is the fastest.

    Batch sizes stay the script's own. SCRIPT runs as it is, so what it writes it writes each time. A plan that fails is
    a row with its reason. Ctrl-C ends the trial that runs and shows what there is.
    """
    from distui.launcher.commands.launch import overrides_of
    from distui.launcher.job.trial import Trials

    given = overrides_of(assignments, {"cluster.nproc": nproc})
    state = _state(config_path, model, given)
    choices = _first(state, plans)
    trials = Trials(warmup, steps, seconds)
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signals.append(signal.SIGHUP)
    restored = {signum: signal.signal(signum, trials.on_signal) for signum in signals}
    target = ("-m", script, *args) if module else (script, *args)
    rows: list[Row] = []
    try:
        for number, choice in enumerate(choices, 1):
            if trials.stopped_by is not None:
                break
            print(f"distui: {number} of {len(choices)}: {choice.name} ...", file=sys.stderr, flush=True)
            trial = trials.measure(_request(target, choice, given, config_path if state.existing else None))
            if trials.stopped_by is None or trial.speed:
                rows.append((choice, _predicted(state, choice, trial), trial))
    finally:
        for signum, handler in restored.items():
            signal.signal(signum, handler)
    rows.sort(key=lambda row: -row[2].speed)
    print(json.dumps([_as_json(row) for row in rows], indent=1)) if as_json else _print(rows)
    if trials.stopped_by is not None:
        return 128 + trials.stopped_by
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout)
    return _conclude(state, rows, target, given, write, say)


def _state(path: Path, model: str | None, given: dict[str, str]) -> WizardState:
    """Return the answers that the file and the command line give. Raises: UserError where one is wrong."""
    from distui.core.hardware.detect import detect
    from distui.launcher.probes.script_model import load_script_model
    from distui.tui.setup.model import WizardState

    state = WizardState.open(path)
    state.models.build_script = load_script_model
    state.set_hardware(detect())
    if model or state.model_text:
        state.set_model(model or state.model_text)
    if (nproc := given.get("cluster.nproc")) and (problem := state.set_value("cluster.nproc", nproc)):
        raise UserError(f"{problem.path}: {problem.what}", problem.why, problem.fix)
    return state


def _first(state: WizardState, number: int) -> list[Choice]:
    """Return the plans to try: what the file has, and the first of the planner's that run here."""
    runs = [choice for choice in state.choices() if choice.available and choice.fits is not False]
    if not runs:
        raise UserError("no plan fits here", "there is nothing to try", "distui plan says what each of them needs")
    runs.sort(key=lambda choice: not choice.is_kept)
    return runs[:number]


def _request(target: tuple[str, ...], choice: Choice, given: dict[str, str], config_path: Path | None) -> Any:
    from distui.launcher.job.request import LaunchRequest

    # A trial is no job that somebody waits for, and saves nothing of its own accord.
    quiet = {
        "telemetry.enabled": "true",
        "checkpoint.every_steps": "0",
        "checkpoint.memory_every_steps": "0",
        "notify.command": "",
        "notify.webhook": "",
    }
    plan = {key: _text(value) for key, value in choice.values.items() if value is not None}
    return LaunchRequest(target, {"run.name": "tune", **plan, **given, **quiet}, config_path, no_tui=True)


def _text(value: Any) -> str:
    """Return a value as `--set` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _predicted(state: WizardState, choice: Choice, trial: Trial) -> Plan | None:
    """Return what the planner says of the batch and the samples that the script had; None where it says nothing."""
    from distui.core.config.schema import Config

    if trial.micro_size is None:
        return choice.plan
    if trial.tokens_per_s and trial.samples_per_s:
        state.set_sequence_length(str(round(trial.tokens_per_s / trial.samples_per_s)))
    tables = state.base.model_dump()
    values = {**choice.values, "batch.micro_size": trial.micro_size, "batch.accumulation": trial.accumulation}
    for key, value in {**values, "batch.global_size": None}.items():
        section, _, name = key.partition(".")
        tables[section][name] = value
    return state.predict(Config.model_validate(tables)) or choice.plan


def _speeds(plan: Plan | None, trial: Trial, length: int) -> tuple[float | None, float | None, str]:
    """Return predicted and measured speed, in the unit that was measured."""
    tokens = plan.tokens_per_s if plan is not None else None
    if trial.tokens_per_s:
        return tokens, trial.tokens_per_s, "tokens/s"
    samples = tokens / length if tokens and length else None
    if trial.samples_per_s or not trial.step_s:
        return samples, trial.samples_per_s, "samples/s"
    return None, 1 / trial.step_s, "steps/s"


def _as_json(row: Row) -> dict[str, Any]:
    choice, plan, trial = row
    return {
        "name": choice.name,
        "settings": dict(choice.values),
        "predicted_tokens_per_s": plan.tokens_per_s if plan is not None else None,
        "predicted_memory_bytes": plan.memory_per_rank_bytes if plan is not None else None,
        "tokens_per_s": trial.tokens_per_s,
        "samples_per_s": trial.samples_per_s,
        "step_s": trial.step_s,
        "steps": trial.num_steps,
        "peak_memory_bytes": trial.peak_memory_bytes,
        "reason": trial.reason,
    }


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from distui.core.telemetry.harmless import harmless
    from distui.tui.format import num_bytes, seconds, si

    table = Table("plan", "predicted", "measured", "a step", "memory planned", "at its peak", "steps", box=None)
    reasons = []
    for choice, plan, trial in rows:
        predicted, measured, unit = _speeds(plan, trial, _length(plan))
        cells = [si(one, unit) if one else "n/a" for one in (predicted, measured)]
        step = seconds(trial.step_s) if trial.step_s else "n/a"
        planned = plan.memory_per_rank_bytes if plan is not None else None
        memory = [num_bytes(one) if one else "n/a" for one in (planned, trial.peak_memory_bytes)]
        table.add_row(choice.name, *cells, step, *memory, str(trial.num_steps))
        if trial.reason:
            reasons.append(f"{choice.name}: {harmless(trial.reason)}")
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for reason in reasons:
        print(reason)
    if any(plan is not None and plan.tokens_per_s is None for _, plan, _ in rows):
        print("speed is predicted once this machine's rates are known: distui plan --calibrate")


def _length(plan: Plan | None) -> int:
    """Return the tokens of a sample that a plan counts with; 0 where there is no plan."""
    if plan is None or not plan.tokens_per_s or not plan.step_s:
        return 0
    return round(plan.tokens_per_s * plan.step_s / plan.global_size)


def _conclude(
    state: WizardState,
    rows: list[Row],
    target: tuple[str, ...],
    given: dict[str, str],
    write: bool,
    say: Callable[[str], None],
) -> int:
    """Say which is the fastest and how to have it, or write it. Raises: UserError where none ran."""
    if not rows or not rows[0][2].speed:
        reason = rows[0][2].reason if rows else "nothing was tried"
        raise UserError("no plan could be measured", reason, f"distui launch --no-tui {shlex.join(target)} shows more")
    best = rows[0][0]
    if not write:
        planned = {key: value for key, value in best.values.items() if value is not None and value != state.value(key)}
        settings = {**{key: _text(value) for key, value in planned.items()}, **given}
        words = [word for key, text in settings.items() for word in ("--set", f"{key}={text}")]
        command_line = shlex.join(["distui", "launch", *words, *target])
        say(f"the fastest is {best.name}: {command_line}\n--write keeps its settings in {state.path}")
        return EXIT_OK
    state.choose(best)
    existing = state.existing
    backup = state.write()
    kept = f"written to {state.path}" if existing is None or backup is not None else f"{state.path} has it already"
    where = f"; its former text is {backup}" if backup is not None else ""
    say(f"the fastest is {best.name}: {kept}{where}")
    return EXIT_OK
