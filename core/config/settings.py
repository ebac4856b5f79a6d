"""Where settings come from: command line, then `DISTUI_<SECTION>_<KEY>`, then `distui.toml`, then the default.

Torch-free. Every problem is found in one go; what cannot work *together* is `distui.core.config.check`'s business.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import tomlkit
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from tomlkit.exceptions import ParseError

from distui.core.config.schema import Config, keys
from distui.core.errors import ConfigError, Problem, UserError

CONFIG_NAME = "distui.toml"
ENV_PREFIX = "DISTUI_"
OTHER_ENV = {
    f"{ENV_PREFIX}{name}" for name in ("STATE_DIR", "RUNTIME_DIR", "NO_TUI", "JOB", "AGENT_PID", "DAEMON_SOCKET")
}
"""Variables of ours that are no settings."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each value came from (`section.key` -> words for a person)."""

    config: Config
    origins: dict[str, str]
    path: Path | None


def env_name(key: str) -> str:
    """Return the environment variable of `section.key`."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that `name` was probably meant to be."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def _atoms(annotation: Any) -> list[Any]:
    """Return the members of a union, literals as their values, Annotated types with what they carry."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return [annotation]
    members = get_args(annotation)
    return [atom for member in members for atom in _atoms(member)] if members else [annotation]


def _type_of(atom: Any) -> Any:
    return get_args(atom)[0] if hasattr(atom, "__metadata__") else atom


def choices(field: FieldInfo) -> list[Any]:
    """Return the values that a field lists, empty where it takes any of a type."""
    return [atom for atom in _atoms(field.annotation) if not isinstance(_type_of(atom), type)]


def accepts(field: FieldInfo) -> str:
    """Return in words what a field takes, such as `0, 1, 2 or 3` or `a whole number above 0`."""
    bounds = list(field.metadata)
    words: list[str] = []
    for atom in _atoms(field.annotation):
        kind = _type_of(atom)
        if kind is NoneType:
            continue
        if kind in (int, float):
            number = "a whole number" if kind is int else "a number"
            for bound in [*bounds, *getattr(atom, "__metadata__", ())]:
                if (above := getattr(bound, "gt", None)) is not None:
                    number += f" above {above}"
                if (least := getattr(bound, "ge", None)) is not None:
                    number += f" of at least {least}"
            words.append(number)
        elif kind is bool:
            words.append("true or false")
        elif kind is str:
            words.append("a text")
        else:
            words.append(str(atom))
    return ", ".join(words[:-1]) + (" or " if words[1:] else "") + words[-1]


def parse_text(field: FieldInfo, text: str) -> Any:
    """Return the value that `text`, from a command line or the environment, has for a field.

    What is no value of the field comes back as the text: validation then says what the field takes.
    """
    atoms = _atoms(field.annotation)
    kinds = [_type_of(atom) for atom in atoms]
    if str in kinds or text in atoms:
        return text
    lowered = text.strip().lower()
    if NoneType in kinds and lowered in ("", "none", "unset"):
        return None
    if bool in kinds and lowered in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return lowered in ("true", "yes", "on", "1")
    for number in (int, float):
        try:
            return number(text.replace("_", ""))
        except ValueError:
            continue
    return text


def _unknown(path: str, origin: str) -> Problem:
    section, _, key = path.partition(".")
    known = keys()
    sections = list(Config.model_fields)
    if section not in sections:
        same = [name for name in known if not key and name.partition(".")[2] == section]
        suggestion = same[0] if same else nearest(path, known) if key else None
        near = nearest(section, sections)
        fix = f"write {suggestion or near}" if suggestion or near else f"the sections are {', '.join(sections)}"
        return Problem(
            path, "unknown key" if key or same else "unknown section", f"{origin} sets it; keys are section.key", fix
        )
    names = [name.partition(".")[2] for name in known if name.startswith(section + ".")]
    near = nearest(key, names) or next((name for name in names if key and key in name.split("_")), None)
    elsewhere = [name for name in known if name.partition(".")[2] == key]
    fix = f"write {section}.{near}" if near else f"[{section}] has {', '.join(names)}"
    if elsewhere:
        fix = f"write {elsewhere[0]}"
    return Problem(path, "unknown key", f"{origin} sets it, and no part of distui reads it", fix)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the configuration {path}", str(error), "name a TOML file, or write one with `distui setup`"
        ) from error
    try:
        return tomlkit.parse(text).unwrap()
    except ParseError as error:
        lines = text.splitlines()
        shown = lines[error.line - 1].strip() if 0 < error.line <= len(lines) else ""
        raise ConfigError(
            [
                Problem(
                    f"{path}:{error.line}",
                    "not valid TOML",
                    f"{error}" + (f": {shown}" if shown else ""),
                    "write `key = value` lines under a [section] line; text needs quotes",
                )
            ]
        ) from error


def _from_file(path: Path, values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    problems = []
    known = keys()
    for section, table in _read_file(path).items():
        if not isinstance(table, dict):
            close = [key for key in known if key.partition(".")[2] == section]
            problems.append(
                Problem(
                    section,
                    "a key outside any section",
                    f"{path.name} sets {section} = {table!r} before the first [section] line",
                    f"write it as {close[0]}" if close else f"the sections are {', '.join(Config.model_fields)}",
                )
            )
            continue
        if section not in Config.model_fields:
            problems.append(_unknown(section, path.name))
            continue
        for name, value in table.items():
            key = f"{section}.{name}"
            if key in known:
                values[key], origins[key] = value, f"file {path}"
            else:
                problems.append(_unknown(key, path.name))
    return problems


def _from_environment(environ: Mapping[str, str], values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    problems = []
    known = {env_name(key): (key, field) for key, field in keys().items()}
    prefixes = tuple(f"{ENV_PREFIX}{section.upper()}_" for section in Config.model_fields)
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_ENV:
            continue
        if name in known:
            key, field = known[name]
            values[key], origins[key] = parse_text(field, text), f"environment {name}"
        elif (near := nearest(name, known, cutoff=0.9)) or name.startswith(prefixes):
            near = near or nearest(name, known)
            problems.append(
                Problem(
                    name,
                    "unknown environment variable",
                    "it looks like a setting, and no part of distui reads it",
                    f"write {near}, or unset it" if near else "unset it",
                )
            )
    return problems


def _invalid(error: ValidationError, values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    """Return one problem a key: a union reports one error a member."""
    found: dict[str, Problem] = {}
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"][:2])
        field = keys()[path]
        value = values[path]
        takes = accepts(field)
        unit = (field.json_schema_extra or {}).get("unit")
        near = nearest(str(value), [str(choice) for choice in choices(field)]) if isinstance(value, str) else None
        fix = f"set {path} to {takes}{f' ({unit})' if unit else ''}"
        found[path] = Problem(
            path,
            f"{value!r} is not {takes}",
            f"it comes from the {origins[path]}; {path} is: {field.description}",
            f"did you mean {near}? {fix}" if near else fix,
        )
    return list(found.values())


def load(
    config_path: Path | None,
    overrides: Mapping[str, str],
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Resolved:
    """Return the configuration after precedence, with each value's origin.

    `overrides` are the command line's `section.key` -> text. Without `config_path`, `distui.toml` in `cwd` is taken
    where it exists.

    Raises:
        ConfigError: every unknown key and every wrong value, at once.
        UserError: the file cannot be read.
    """
    environ = os.environ if environ is None else environ
    if config_path is None:
        candidate = (cwd or Path.cwd()) / CONFIG_NAME
        config_path = candidate if candidate.is_file() else None
    known = keys()
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(known, "default")
    problems: list[Problem] = []
    if config_path is not None:
        problems += _from_file(config_path, values, origins)
    problems += _from_environment(environ, values, origins)
    for key, text in overrides.items():
        if key in known:
            values[key], origins[key] = parse_text(known[key], text), "command line"
        else:
            problems.append(_unknown(key, "the command line"))
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(problems + _invalid(error, values, origins)) from error
    if problems:
        raise ConfigError(problems)
    return Resolved(config, origins, config_path)


def to_toml(config: Config, *, comments: bool = False) -> str:
    """Return the configuration as TOML, every key with its value; what is unset is a comment.

    `comments` puts each key's description above it.
    """
    document = tomlkit.document()
    for section in Config.model_fields:
        table = tomlkit.table()
        for name, field in type(getattr(config, section)).model_fields.items():
            value = getattr(getattr(config, section), name)
            if comments:
                table.add(tomlkit.comment(str(field.description)))
            if value is None:
                table.add(tomlkit.comment(f"{name} is unset"))
            else:
                table.add(name, value)
        document.add(section, table)
        document.add(tomlkit.nl())
    return tomlkit.dumps(document)
