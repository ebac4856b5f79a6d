"""`distui config`: what the settings are, where each comes from, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import click

from distui.core.errors import ConfigError, UserError

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
    from distui.core.config import keys
    from distui.core.settings import load
    from distui.launcher.launch_command import overrides_of

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
    from distui.core.config_check import check
    from distui.core.hardware import detect
    from distui.core.settings import load
    from distui.launcher.launch import decided
    from distui.launcher.launch_command import overrides_of

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
    from distui.core.config import Config, keys
    from distui.core.settings import accepts, env_name

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


@command.command("import", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def import_settings(arguments: tuple[str, ...]) -> None:
    """Read a DeepSpeed JSON or an Accelerate YAML (not available in this version)."""
    raise _not_yet("distui config import")


@command.command("export", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def export_settings(arguments: tuple[str, ...]) -> None:
    """Write a DeepSpeed JSON or an Accelerate YAML (not available in this version)."""
    raise _not_yet("distui config export")


def _not_yet(what: str) -> UserError:
    return UserError(
        f"{what} is not available in this version",
        "no code stands behind it yet",
        "write the settings by hand: distui config schema lists them, distui config check checks them",
    )
