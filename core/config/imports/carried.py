"""What an import brings: settings of ours, and a word on every key that did not become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distui.core.config.schema import keys
from distui.core.config.settings import accepts, nearest
from distui.core.errors import ConfigError, Problem

Kind = Literal["lost", "needless", "changed", "script", "unknown"]

KINDS: dict[Kind, str] = {
    "lost": "not carried over",
    "unknown": "not a known key",
    "changed": "carried over with a change",
    "script": "belongs to the training script",
    "needless": "needs no setting",
}
"""Kinds of notes, the gravest first, in words."""


@dataclass(frozen=True, slots=True)
class Note:
    """A key of the other tool's file that is not simply one of ours."""

    key: str
    kind: Kind
    why: str


@dataclass(slots=True)
class Carried:
    """The outcome of an import: `values` by our `section.key`, and `notes`."""

    source: str
    """Whose file it was: DeepSpeed or Accelerate."""
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Take `value` for our `key`; a value that the schema does not take is a problem of `origin`."""
        known = keys()
        if key not in known:
            self.note(origin, "lost", f"{key} is no setting of this version")
            return
        before = self.values.get(key)
        if before is not None and before != value:
            self.problems.append(
                Problem(
                    origin,
                    f"says {key} = {value!r}, and another key says {before!r}",
                    "both set the same thing",
                    "take one of them out",
                )
            )
        self.values[key] = value

    def note(self, key: str, kind: Kind, why: str) -> None:
        """Remember what became of `key`."""
        self.notes.append(Note(key, kind, why))

    def wrong(self, key: str, value: Any, takes: str) -> None:
        """Remember that `key` cannot have `value`."""
        self.problems.append(
            Problem(key, f"{value!r} is not {takes}", f"{self.source} reads it so too", f"set {takes}")
        )

    def unknown(self, key: str, known: Iterable[str]) -> None:
        """Remember that the other tool has no such `key`; it would have ignored it silently."""
        name = key.rpartition(".")[2]
        near = nearest(name, {other.rpartition(".")[2] for other in known}, cutoff=0.75)
        self.note(key, "unknown", f"{self.source} has no such key" + (f"; did you mean {near}?" if near else ""))

    def finish(self) -> Carried:
        """Return it if every value is one that our schema takes.

        Raises:
            ConfigError: every problem at once.
        """
        from pydantic import ValidationError

        from distui.core.config.schema import Config

        tables: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            tables.setdefault(section, {})[name] = value
        try:
            Config.model_validate(tables)
        except ValidationError as error:
            fields = keys()
            for path in {".".join(str(part) for part in detail["loc"][:2]) for detail in error.errors()}:
                takes = accepts(fields[path])
                self.problems.append(
                    Problem(
                        path, f"{self.values[path]!r} is not {takes}", f"the {self.source} file says so", f"set {takes}"
                    )
                )
        if self.problems:
            raise ConfigError(self.problems)
        return self


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys; empty tables vanish."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def truth(value: Any) -> bool | None:
    """Return what a foreign file means by a flag; None for what is no flag (`auto` among it)."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text)
