"""Finds out whose configuration a file is, and reads it."""

from __future__ import annotations

from pathlib import Path

from distui.core.config.imports import accelerate, deepspeed
from distui.core.config.imports.carried import Carried
from distui.core.config.imports.parsing import parse_json, parse_yaml, read_text
from distui.core.errors import UserError

_ACCELERATE_SIGNS = {"distributed_type", "num_processes", "compute_environment", "num_machines", "fsdp_config"}


def import_file(path: Path) -> Carried:
    """Return what a DeepSpeed JSON or an Accelerate YAML or JSON says in our settings.

    Raises:
        UserError: the file cannot be read, or is neither.
        ConfigError: values that its own tool would refuse too, all at once.
    """
    text = read_text(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    data = parse_json(path, text) if is_json else parse_yaml(path, text)
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
