"""What changes a whole strategy at once: another tool's file, or fields that were set by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distui.core.config.imports.carried import Carried
from distui.core.config.schema import Config
from distui.tui.setup.model import WizardState
from distui.tui.setup.planning import Choice

BATCH_KEYS = ("batch.global_size", "batch.micro_size", "batch.accumulation")


def take_import(state: WizardState, carried: Carried, name: str) -> None:
    """Start from what another tool's file says: its values stand above those of an existing distui.toml."""
    state.imported, state.import_name = carried, name
    brought = dict(carried.values)
    if any(brought.get(key) is not None for key in BATCH_KEYS):
        # Three sizes of which two come from different files would contradict each other.
        brought = dict.fromkeys(BATCH_KEYS) | brought
    state.base = _with(state.base, brought)
    state.stated |= set(carried.values)
    state.brought = brought
    state.touched = True


def changed(state: WizardState, choice: Choice, changes: Mapping[str, Any]) -> Choice:
    """Return the strategy that `choice` becomes with some of its `section.key` values changed, predicted anew."""
    values = {**choice.values, **changes}
    config = _with(state.base, {**state.brought, **values})
    plan = state.predict(config)
    if plan is None:
        return Choice(config.summary(), values, "changed by hand; memory and speed are n/a")
    return Choice(plan.name, values, plan.why, plan, plan.available)


def _with(base: Config, values: Mapping[str, Any]) -> Config:
    tables = base.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables[section][name] = value
    return Config.model_validate(tables)
