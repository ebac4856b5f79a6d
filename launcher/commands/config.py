"""`distui config`: what the settings are, where each comes from, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from distui.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from distui.core.config.imports.carried import Note

_SETTINGS = [
    click.option("--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help="Or ./distui.toml."),
    click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting, as section.key=value."),
]


def _with_settings(function: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(_SETTINGS):
        function = option(function)
    return function


@click.group("config", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Show, check or describe the settings of distui.toml."""


@command.command("show")
@_with_settings
def show(config_path: Path | None, assignments: tuple[str, ...]) -> None:
    """Print every setting with its value and where it comes from."""
    from distui.core.config.schema import keys
    from distui.core.config.settings import load
    from distui.launcher.commands.launch import overrides_of

    resolved = load(config_path, overrides_of(assignments, {}))
    names = list(keys())
    values = {}
    for name in names:
        section, _, key = name.partition(".")
        value = getattr(getattr(resolved.config, section), key)
        values[name] = "(unset)" if value is None else repr(value) if isinstance(value, str) else str(value).lower()
    width, value_width = max(map(len, names)), max(map(len, values.values()))
    for name in names:
        click.echo(f"{name:<{width}}  {values[name]:<{value_width}}  {resolved.origins[name]}")


@command.command("check")
@_with_settings
def check_settings(config_path: Path | None, assignments: tuple[str, ...]) -> None:
    """Check the settings against each other and this machine; print every problem, exit 2 where there is one."""
    from distui.core.config.check import check
    from distui.core.config.settings import load
    from distui.core.hardware.detect import detect
    from distui.launcher.commands.launch import overrides_of
    from distui.launcher.job.launch import decided

    resolved = load(config_path, overrides_of(assignments, {}))
    hardware = detect()
    config = decided(resolved.config, hardware)
    if problems := check(config, hardware):
        raise ConfigError(problems)
    world_size = int(config.cluster.nproc) * config.cluster.nodes
    click.echo(f"ok: {resolved.path or 'defaults'}: {config.summary()}, {world_size} ranks on {hardware.name}")


@command.command("schema")
@click.option("--json", "as_json", is_flag=True, help="JSON Schema instead of text.")
def schema(as_json: bool) -> None:
    """Print every setting with its default, unit, what it takes and what it is."""
    from distui.core.config.schema import Config, keys
    from distui.core.config.settings import accepts, env_name

    if as_json:
        import json

        click.echo(json.dumps(Config.model_json_schema(), indent=1))
        return
    shown = ""
    for name, field in keys().items():
        section = name.partition(".")[0]
        if section != shown:
            click.echo(f"{'' if not shown else chr(10)}[{section}]")
            shown = section
        extra = field.json_schema_extra
        unit = extra.get("unit") if isinstance(extra, dict) else None
        click.echo(f"{name}: {field.description}")
        default = "unset" if field.default is None else repr(field.default)
        click.echo(f"    {accepts(field)}{f', in {unit}' if unit else ''}; default {default}; {env_name(name)}")


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="distui.toml",
    show_default=True,
    help="Where the settings go; - only prints them.",
)
@click.option("--merge", is_flag=True, help="Change the keys in a file that exists; the former is kept as FILE.bak.")
def import_settings(file: Path, output: str, merge: bool) -> None:
    """Read a DeepSpeed JSON or an Accelerate YAML into distui.toml.

    The settings are printed to stdout; what became of every other key of FILE is said on stderr.
    """
    from distui.core.config import file as config_file
    from distui.core.config.imports.files import import_file

    carried = import_file(file)
    path = None if output == "-" else Path(output)
    before = config_file.read_text(path) if path is not None and merge else None
    text = config_file.merge(before, carried.values)
    click.echo(text, nl=False)
    _say(carried.notes)
    if path is None:
        return
    if not merge and (present := config_file.read_text(path)):
        if present == text:
            return
        raise UserError(
            f"{path} exists already and says something else",
            f"nothing was written; {len(carried.values)} keys of {file} would go into it",
            "add --merge to change those keys in it (the former file is kept), or name another with --output",
        )
    if not merge and path.exists():
        return  # an empty file: the shell made it for our own stdout, as in `distui config import FILE > distui.toml`
    backup = config_file.write(path, text, expected=before)
    click.echo(
        f"wrote {path} from {carried.source}'s {file}" + (f"; the former is {backup}" if backup else ""), err=True
    )


@command.command("export")
@click.option("--to", "tool", type=click.Choice(["deepspeed", "accelerate"]), required=True, help="Whose file it is.")
@click.option("-o", "--output", metavar="FILE", default="-", help="Where it goes; without it, stdout.")
@_with_settings
def export_settings(tool: str, output: str, config_path: Path | None, assignments: tuple[str, ...]) -> None:
    """Write the settings as a DeepSpeed JSON or an Accelerate YAML; what has no place there is said on stderr."""
    from distui.core.config import file as config_file
    from distui.core.config.export import export, to_text
    from distui.core.config.settings import load
    from distui.core.hardware.detect import detect
    from distui.launcher.commands.launch import overrides_of
    from distui.launcher.job.launch import decided

    config = load(config_path, overrides_of(assignments, {})).config
    if tool == "accelerate":  # its file states the number of processes
        config.cluster.nproc = decided(config, detect()).cluster.nproc
    table, notes = export(config, tool)
    text = to_text(table, tool)
    _say(notes)
    if output == "-":
        click.echo(text, nl=False)
        return
    path = Path(output)
    backup = config_file.write(path, text, expected=config_file.read_text(path))
    click.echo(f"wrote {path}" + (f"; the former is {backup}" if backup else ""), err=True)


def _say(notes: list[Note]) -> None:
    """Print notes by kind, the gravest first, one line a reason."""
    from distui.core.config.imports.carried import KINDS

    for kind, words in KINDS.items():
        reasons: dict[str, list[str]] = {}
        for note in notes:
            if note.kind == kind:
                reasons.setdefault(note.why, []).append(note.key)
        if reasons:
            click.echo(f"{words}:", err=True)
        for why, names in reasons.items():
            click.echo(f"  {', '.join(dict.fromkeys(names))}: {why}", err=True)
