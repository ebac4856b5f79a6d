"""Edit a `distui.toml` in place: comments, order and what it does not know stay; writes are atomic.

Torch-free. Reading values with their precedence is `distui.core.config.settings`; this module only changes the text.
"""

from __future__ import annotations

import difflib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import ParseError, TOMLKitError
from tomlkit.items import Table
from tomlkit.toml_document import TOMLDocument

from distui.core.config.schema import Config, keys
from distui.core.errors import UserError
from distui.core.paths import write_atomic

HEADER = (
    "Settings of distui; `distui config show` prints every value with its origin.",
    "The command line and DISTUI_* variables win over this file.",
)


def read_text(path: Path) -> str | None:
    """Return the file's text; None where there is no file.

    Raises:
        UserError: it is there and cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}", str(error), "name another file with --config, or make this one readable"
        ) from error


def flat_of(text: str) -> dict[str, Any]:
    """Return `section.key` -> value of a file's text; empty where it cannot be read."""
    try:
        tables = tomlkit.parse(text).unwrap()
    except TOMLKitError:
        return {}
    return {
        f"{section}.{key}": value
        for section, table in tables.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }


def check_writable(path: Path) -> None:
    """Refuse a path that a file cannot be written to, before anybody spends time on its contents.

    Raises:
        UserError: the folder is missing or takes no new file, or the path is a folder or a read-only file.
    """
    path = path.resolve()
    folder = path.parent
    if not folder.exists():
        raise UserError(f"cannot write {path}", f"the folder {folder} does not exist", f"mkdir -p {folder}")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}", f"{folder} is a file, not a folder", "name another file with --config")
    if path.is_dir():
        raise UserError(
            f"cannot write {path}", "it is a folder", f"name a file, such as --config {path / 'distui.toml'}"
        )
    if path.exists() and not os.access(path, os.W_OK):
        mode = stat.S_IMODE(path.stat().st_mode)
        raise UserError(
            f"cannot write {path}",
            f"its mode is {mode:04o} and you are uid {os.getuid()}",
            f"chmod u+w {path}, or name another file with --config",
        )
    try:
        # Only the attempt tells: a read-only file system or a full disk lets os.access say yes.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}",
            f"{error.strerror or error} (uid {os.getuid()}, mode {stat.S_IMODE(folder.stat().st_mode):04o})",
            "run it in a folder of your own, or name a file with --config",
        ) from error


def merge(text: str | None, values: Mapping[str, Any]) -> str:
    """Return the text with each `section.key` of `values` set; None takes the key out.

    Without a text it is a new file, each key under its description. In an existing one comments and order stay, a
    value that is equal stays as it was written, and a key that is not there is only added where it differs from the
    default.

    Raises:
        UserError: the text is no TOML, or has something else where a section belongs.
        KeyError: a key that the schema does not have.
    """
    known = keys()
    for key in values:
        if key not in known:
            raise KeyError(key)
    return _new_file(values) if text is None else _edited(text, values)


def diff(before: str | None, after: str, name: str) -> list[str]:
    """Return the unified diff without line ends; empty where nothing changes."""
    old = [] if before is None else before.splitlines()
    return list(difflib.unified_diff(old, after.splitlines(), f"{name} (now)", f"{name} (new)", lineterm="", n=2))


def write(path: Path, text: str, *, expected: str | None) -> Path | None:
    """Replace the file atomically and return where the former one is kept; None where there was none or it is equal.

    `expected` is what the new text was made from.

    Raises:
        UserError: the file has changed since, or cannot be written; nothing is lost then.
    """
    check_writable(path)
    path = path.resolve()
    present = read_text(path)
    if present != expected:
        raise UserError(
            f"{path} has changed meanwhile",
            "it was written by something else since it was read here",
            "start again: its present values are taken over then",
        )
    if present == text:
        return None
    backup = None
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if present is not None else None
        if present is not None:
            backup = path.with_name(f"{path.name}.bak")
            write_atomic(backup, present)
        write_atomic(path, text)
        if mode is not None:
            path.chmod(mode)
    except OSError as error:
        raise UserError(
            f"cannot write {path}", f"{error.strerror or error}", "free some space, or name another file with --config"
        ) from error
    return backup


def _new_file(values: Mapping[str, Any]) -> str:
    known = keys()
    document = tomlkit.document()
    for line in HEADER:
        document.add(tomlkit.comment(line))
    for section in Config.model_fields:
        table = tomlkit.table()
        for key, field in known.items():
            if key.startswith(f"{section}.") and values.get(key) is not None:
                table.add(tomlkit.comment(str(field.description)))
                table.add(key.partition(".")[2], values[key])
        if table:
            document.add(tomlkit.nl())
            document.add(section, table)
    return tomlkit.dumps(document)


def _edited(text: str, values: Mapping[str, Any]) -> str:
    try:
        document = tomlkit.parse(text)
    except ParseError as error:
        raise UserError(
            "the existing file is not valid TOML", str(error), "mend that line, or move the file away"
        ) from error
    known = keys()
    for key, value in values.items():
        section, _, name = key.partition(".")
        table: Any = document.get(section)
        if table is not None and not isinstance(table, dict):
            raise UserError(
                f"{section} is no section",
                f"the file sets it to {table!r}",
                f"write [{section}] on a line of its own, and its keys below",
            )
        if table is not None and name in table:
            if value is None:
                del table[name]
            elif table[name] != value:
                table[name] = value
        elif value is not None and value != known[key].get_default():
            _add(document, section, name, value)
    edited = tomlkit.dumps(document)
    if not _holds(edited, values):  # an unusual spelling that the edit would break: rather refuse than damage
        raise UserError(
            "this file cannot be edited without breaking it",
            "a section is spelled in a way that takes no further key",
            "write its sections as [section] lines with key = value lines below, or move the file away",
        )
    return edited


def _holds(text: str, values: Mapping[str, Any]) -> bool:
    """Return whether the text gives every key its value; a missing key has its default."""
    try:
        found = tomlkit.parse(text).unwrap()
    except TOMLKitError:
        return False
    known = keys()
    for key, value in values.items():
        section, _, name = key.partition(".")
        if found.get(section, {}).get(name, known[key].get_default() if value is not None else None) != value:
            return False
    return True


def _add(document: TOMLDocument, section: str, name: str, value: Any) -> None:
    """Put a new key at the end of its section, before the blank lines that part it from the next one."""
    if section not in document:
        if document.as_string() and not document.as_string().endswith("\n\n"):
            document.add(tomlkit.nl())
        document.add(section, tomlkit.table())
    table: Any = document[section]
    if not isinstance(table, Table):  # an inline table or dotted keys
        table[name] = value
        return
    body = table.value.body
    last = max((index for index, (key, _) in enumerate(body) if key is not None), default=None)
    if last is None:
        table.add(name, value)
        return
    last_key = body[last][0]
    assert last_key is not None
    table.value._insert_after(last_key, name, tomlkit.item(value))
