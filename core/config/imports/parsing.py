"""Reads a JSON or YAML file of another tool as a table of keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distui.core.errors import UserError


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in `path`; comments, as DeepSpeed takes them, are read over.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return parse_json(path, read_text(path))


def read_text(path: Path) -> str:
    """Return what stands in `path`. Raises: UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}", str(getattr(error, "strerror", None) or error), "name a JSON or YAML file"
        ) from error


def parse_json(path: Path, text: str) -> Mapping[str, Any]:
    """Return the object that `text` of `path` is, read over comments. Raises: UserError for anything else."""
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


def parse_yaml(path: Path, text: str) -> Mapping[str, Any]:
    """Return the object that `text` of `path` is. Raises: UserError for anything else."""
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
