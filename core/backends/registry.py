"""Finds a backend by the name that its distribution registers under the entry point `distui.backends`."""

from __future__ import annotations

from importlib.metadata import entry_points

import torch.distributed as dist

from distui.core.backends.base import Backend
from distui.core.config import Config
from distui.core.errors import UserError


def load_backend(config: Config, group: dist.ProcessGroup | None) -> Backend:
    """Return the configured backend.

    Raises: UserError that lists the registered names.
    """
    name = config.strategy.backend
    if name == "native":
        from distui.core.backends.native import NativeBackend

        return NativeBackend(config, group)
    found = {point.name: point for point in entry_points(group="distui.backends")}
    if name not in found:
        raise UserError(
            f"strategy.backend={name!r} is not installed",
            f"registered are {', '.join(sorted({'native', *found}))}",
            "choose one of them, or install the distribution that brings it",
        )
    backend: type[Backend] = found[name].load()
    return backend(config, group)
