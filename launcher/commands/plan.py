"""`distui plan`: every strategy for a model on a machine, with its memory and speed, before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from distui.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from distui.core.hardware.detect import Hardware
    from distui.core.plan.types import ModelSpec, Plan, Term

NUM_SHOWN = 12
"""Rows of each table without --all."""

SIZE_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_bytes(text: str) -> int:
    """Return the bytes that `512GiB`, `512G` or `64 GB` mean; all units are powers of 1024.

    Raises: UserError where it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"{text!r} is no memory size", "it takes a number and a unit", "write for example 512GiB")
    unit = match[2].upper()
    return int(float(match[1]) * (1 if not unit else 1 << SIZE_UNITS[unit]))


@click.command("plan", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "model_text", help="Preset, Hugging Face id, config.json, its folder, or a count such as 7B.")
@click.option("--script", metavar="FILE.py:FUNC", help="A function that builds the model; measured on the meta device.")
@click.option(
    "--hardware", "hardware_text", default="detect", show_default=True, help="8xA100-40GB, 4x8xH100-80GB, ..."
)
@click.option("--seq", "sequence_length", type=click.IntRange(min=1), help="Tokens in a sequence.")
@click.option("--global-size", type=click.IntRange(min=1), help="Samples in one optimizer step over all ranks.")
@click.option("--micro-size", type=click.IntRange(min=1), help="Samples in one forward on a rank; else the best one.")
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks a node; else one for each GPU.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Format of parameters and compute.")
@click.option("--reduce-dtype", type=click.Choice(["fp32", "same"]), default="fp32", show_default=True)
@click.option("--optimizer", default="adamw", show_default=True, help="Optimizer whose states are counted.")
@click.option("--goal", type=click.Choice(["throughput", "memory", "cost"]), default="throughput", show_default=True)
@click.option("--margin", type=click.FloatRange(0, 0.9), default=0.08, show_default=True, help="Memory kept free.")
@click.option(
    "--backend",
    "backend",
    type=click.Choice(["native", "ddp", "fsdp2", "deepspeed", "all"]),
    default="native",
    show_default=True,
)
@click.option(
    "--compression",
    type=click.Choice(["none", "onebit", "int8", "fp8", "all"]),
    default="none",
    show_default=True,
    help="Format of gradients between ranks.",
)
@click.option("--calibrate", is_flag=True, help="First measure this machine by a short run, and keep it for plans.")
@click.option("--host-memory", help="Host memory of a node of a named machine, such as 512GiB.")
@click.option("--network-gbits", type=click.FloatRange(min=0.001), help="Network of a node in Gbit/s.")
@click.option(
    "--available", "available_only", is_flag=True, help="With --json too: only what this version of distui can run."
)
@click.option("--all", "show_all", is_flag=True, help="Every row, and what this version cannot run yet.")
@click.option("--explain", "explained", metavar="NAME", help="Every number of one plan, with formula and source.")
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
def command(
    model_text: str | None,
    script: str | None,
    hardware_text: str,
    sequence_length: int | None,
    host_memory: str | None,
    network_gbits: float | None,
    backend: str,
    compression: str,
    calibrate: bool,
    show_all: bool,
    explained: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rank every strategy by predicted memory per rank and throughput, and say why the others do not fit."""
    from distui.core.plan.search import BACKENDS, COMPRESSIONS, plan_all

    hardware = read_hardware(hardware_text, host_memory, network_gbits)
    if calibrate:
        hardware = run_calibration(hardware, options["nproc"])
        if model_text is None and script is None:
            return
    model = read_model(model_text, script, sequence_length)
    options["backends"] = tuple(BACKENDS) if backend == "all" else (backend,)
    options["compressions"] = COMPRESSIONS if compression == "all" else (compression,)
    plans = sorted(plan_all(model, hardware, **options), key=lambda plan: (not plan.fits, not plan.available))
    if explained is not None:
        plan = find_plan(plans, explained)
        terms = terms_of(plan, model, hardware)
        if as_json:
            rows = [asdict(term) for term in terms]
            click.echo(json.dumps({"plan": plan.as_json(), "terms": rows}, indent=1))
        else:
            print_terms(plan, terms)
        return
    if as_json:
        found = {"model": model.name, "hardware": hardware.name, "plans": [plan.as_json() for plan in plans]}
        click.echo(json.dumps(found, indent=1))
        return
    print_plans(model, hardware, plans, None if show_all else NUM_SHOWN, options["margin"])


def run_calibration(hardware: Hardware, nproc: int | None) -> Hardware:
    """Measure this machine and say on stderr what came out."""
    from distui.launcher.probes.calibrate import calibrate, report

    click.echo("distui: calibrating; this takes up to a minute", err=True)
    hardware = calibrate(hardware, nproc)
    for line in report(hardware, nproc or hardware.ranks_per_node):
        click.echo(f"  {line}", err=True)
    return hardware


def read_model(text: str | None, script: str | None, sequence_length: int | None) -> ModelSpec:
    """Return the model that the options name, or else the one that distui.toml remembers.

    Raises: UserError where there is none, or two.
    """
    from distui.core.config.settings import load
    from distui.core.plan.models import load_model
    from distui.launcher.probes.script_model import load_script_model

    if text is not None and script is not None:
        raise UserError("--model and --script are both given", "each names a model", "leave one of them out")
    if script is not None:
        return load_script_model(script, sequence_length)
    text = text or load(None, {}).config.run.model
    if not text:
        raise UserError(
            "no model is named",
            "neither --model nor --script is given, and no distui.toml here has run.model",
            "write --model llama-7b, --model 7B, --model path/of/config.json or --script train.py:build_model",
        )
    return load_script_model(text, sequence_length) if is_script(text) else load_model(text, sequence_length)


def is_script(text: str) -> bool:
    """Tell whether a remembered model is FILE.py:FUNCTION."""
    return ".py:" in text


def read_hardware(text: str, host_memory: str | None, network_gbits: float | None) -> Hardware:
    """Return the hardware that the options describe."""
    from distui.core.hardware.detect import parse_hardware

    hardware = parse_hardware(text)
    if host_memory is not None:
        size = parse_bytes(host_memory)
        hardware = replace(hardware, memory_total_bytes=size, memory_available_bytes=size)
    if network_gbits is not None:
        bandwidth = network_gbits * 1e9 / 8
        hardware = replace(hardware, node_bandwidth=bandwidth, node_bandwidth_source="--network-gbits")
    return hardware


def find_plan(plans: Sequence[Plan], name: str) -> Plan:
    """Return the plan called `name`; a beginning that only one has is enough.

    Raises: UserError with the nearest names.
    """
    wanted = name.strip().lower()
    exact = [plan for plan in plans if plan.name.lower() == wanted]
    matches = exact or [plan for plan in plans if plan.name.lower().startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    names = [plan.name for plan in matches or plans]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    why = f"{len(matches)} plans begin so" if matches else f"there are {len(plans)} plans and none begins so"
    raise UserError(f"no single plan is called {name!r}", why, f"write {' or '.join(repr(each) for each in near)}")


def terms_of(plan: Plan, model: ModelSpec, hardware: Hardware) -> list[Term]:
    """Return the plan's numbers with formula and source."""
    from distui.core.plan.search import explain

    return explain(plan, model, hardware)


def _console() -> Console:
    import shutil
    import sys

    from rich.console import Console

    # In a pipe there is no width to fit: wide enough that nothing is cut.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False)


def print_plans(
    model: ModelSpec, hardware: Hardware, plans: Sequence[Plan], num_shown: int | None, margin: float
) -> None:
    """Print what fits as a ranked table, then why the others do not."""
    from distui.core.plan.distinct import distinct
    from distui.tui.format import num_bytes, si

    console = _console()
    console.print(
        f"{model.name}: {si(model.num_parameters)} parameters, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.sequence_length} tokens ({model.source})",
        markup=False,
    )
    first = plans[0] if plans else None
    limit = first.memory_limit_bytes if first else None
    ranks = ""
    if first:
        ranks = f"{first.world_size} rank{'' if first.world_size == 1 else 's'} in {first.precision}, "
    console.print(f"{hardware.name}: {ranks}{num_bytes(limit)} a rank, {margin:.0%} kept free", markup=False)
    runs = list(plans) if num_shown is None else [plan for plan in plans if plan.available]
    num_later = sum(plan.fits for plan in plans) - sum(plan.fits for plan in runs)
    fitting = [plan for plan in runs if plan.fits]
    misfits = [plan for plan in runs if not plan.fits]
    if fitting:
        shown = fitting if num_shown is None else distinct(fitting)[:num_shown]
        console.print(plan_table(shown))
        if len(shown) < len(fitting):
            rest = (
                f"{len(fitting) - len(shown)} more fit, slower or no leaner than a simpler one here: --all shows them"
            )
            console.print(rest, style="dim")
        notes = dict.fromkeys(
            note for plan in shown for note in plan.why.split("; ") if note.startswith("tokens/s n/a")
        )
        for note in notes:
            console.print(note, markup=False)
        if any(not plan.available for plan in shown):
            console.print("* not available in this version of distui", style="dim")
    else:
        console.print("nothing fits that this version can run" if num_later else "nothing fits", style="bold")
    if num_later:
        console.print(f"{num_later} more fit that this version of distui cannot run yet: --all shows them", style="dim")
    if misfits:
        console.print("\nwhat does not fit:")
        told = misfits if num_shown is None else distinct(misfits)
        told = told[: None if num_shown is None else num_shown // 2]
        for plan in told:
            console.print(f"  {plan.name}: {plan.why}", markup=False)
        if len(misfits) > len(told):
            console.print(f"{len(misfits) - len(told)} more do not: --all shows them", style="dim")


def plan_table(plans: Sequence[Plan]) -> Table:
    """Return a row a plan; what is not known is n/a."""
    from rich.box import SIMPLE
    from rich.table import Table

    from distui.tui.format import num_bytes, seconds, si

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("strategy", overflow="fold")
    for heading in ("micro", "memory a rank", "states", "activations", "step", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in plans:
        memory = plan.memory
        states = memory["parameters"] + memory["gradients"] + memory["optimizer_states"]
        table.add_row(
            f"{plan.name}{'' if plan.available else ' *'}",
            str(plan.micro_size) if plan.accumulation == 1 else f"{plan.micro_size} x{plan.accumulation}",
            num_bytes(plan.memory_per_rank_bytes),
            num_bytes(states),
            num_bytes(memory["activations"] + memory["logits"]),
            seconds(plan.step_s),
            si(plan.tokens_per_s),
        )
    return table


def print_terms(plan: Plan, terms: Sequence[Term]) -> None:
    """Print every number of one plan with its formula and source."""
    from rich.box import SIMPLE
    from rich.table import Table

    console = _console()
    console.print(f"{plan.name}: {plan.why}", markup=False)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("term", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("formula", overflow="fold")
    table.add_column("source", overflow="fold")
    for term in terms:
        table.add_row(term.name, format_value(term), term.formula, term.source)
    console.print(table)


def format_value(term: Term) -> str:
    """Return the term's value with its unit."""
    from distui.tui.format import num_bytes, seconds, si

    if term.unit == "bytes":
        return num_bytes(term.value)
    if term.unit == "s":
        return seconds(term.value)
    if term.unit == "1":
        return f"{term.value:.2f}" if term.value < 10 else si(term.value)
    return si(term.value, term.unit.replace("bytes", "B"))
