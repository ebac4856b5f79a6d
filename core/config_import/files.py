"""Finds out whose configuration a file is, and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distui.core.config_import import accelerate, deepspeed
from distui.core.config_import.carried import Carried
from distui.core.errors import UserError

_ACCELERATE_SIGNS = {"distributed_type", "num_processes", "compute_environment", "num_machines", "fsdp_config"}


def import_file(path: Path) -> Carried:
    """Return what a DeepSpeed JSON or an Accelerate YAML or JSON says in our settings.

    Raises:
        UserError: the file cannot be read, or is neither.
        ConfigError: values that its own tool would refuse too, all at once.
    """
    text = _text(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    data = _json(path, text) if is_json else _yaml(path, text)
    if _ACCELERATE_SIGNS & set(data):
        return accelerate.read(data, path.parent)
    known = {key.split(".")[0] for key in deepspeed.known_keys()}
    if known & set(data):
        return deepspeed.read(data)
    shown = ", ".join(list(map(str, data))[:5]) or "nothing"
    raise UserError(
        f"{path} is neither a DeepSpeed nor an Accelerate configuration",
        f"its keys are {shown}; neither tool's keys are among them",
        "name a DeepSpeed JSON (train_batch_size, zero_optimization, ...) or a file that `accelerate config` wrote",
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in `path`; comments, as DeepSpeed takes them, are read over.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return _json(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}", str(getattr(error, "strerror", None) or error), "name a JSON or YAML file"
        ) from error


def _json(path: Path, text: str) -> Mapping[str, Any]:
    import json

    try:
        data = json.loads(text)
    except json.JSONDecodeError as first:
        # Slow, so only for what plain JSON refuses: comments and trailing commas.
        import json5

        try:
            data = json5.loads(text)
        except ValueError:
            raise _not_valid(path, "JSON", f"line {first.lineno}, column {first.colno}: {first.msg}") from first
    return _object(path, data)


def _yaml(path: Path, text: str) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _not_valid(path, "YAML", " ".join(str(error).split())) from error
    return _object(path, data)


def _not_valid(path: Path, form: str, why: str) -> UserError:
    return UserError(f"{path} is not valid {form}", why, "mend that place; its own tool could not read it either")


def _object(path: Path, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(
            f"{path} holds no settings",
            f"it is {'empty' if data is None else 'a ' + type(data).__name__}, not a table of keys",
            "name a DeepSpeed JSON or an Accelerate YAML",
        )
    return data
