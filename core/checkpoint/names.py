"""What a manifest says of objects, so that a checkpoint of others is told from one's own."""

from __future__ import annotations

from typing import Any

from torch import nn


def class_of(prepared: Any) -> str:
    """Return the name of the class of a prepared optimizer or scheduler, as the script made it."""
    own = getattr(prepared, "inner", None) or getattr(prepared, "scheduler", None) or prepared
    return type(own).__name__


def params_of_groups(optimizer: Any) -> list[int] | None:
    """Return how many parameters each group had before it was prepared; None where the engine did not see it."""
    found: list[int] | None = getattr(optimizer, "params_of_groups", None)
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters and buffers that have several, each with its first."""
    first: dict[int, str] = {}
    tied = {}
    for found in (nn.Module.named_parameters, nn.Module.named_buffers):
        for name, value in found(model, remove_duplicate=False):
            if id(value) in first:
                tied[name] = first[id(value)]
            first.setdefault(id(value), name)
    return tied


def transient_names(model: nn.Module) -> list[str]:
    """Return the names of buffers that the model's own state_dict leaves out."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    ]
