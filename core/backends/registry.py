"""Finds a backend by its name: ours, or what a distribution registers under the entry point `distui.backends`.

Torch-free until a backend is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distui.core.config.backends import find_backend, registered
from distui.core.config.schema import Config
from distui.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch.distributed as dist

    from distui.core.backends.base import Backend


def load_backend(config: Config, group: dist.ProcessGroup | None) -> Backend:
    """Return the configured backend.

    Raises: UserError that lists the registered names, or says why the backend cannot be imported; ConfigError with
    what the backend itself finds wrong.
    """
    name = config.strategy.backend
    found = find_backend(name)
    if found is None:
        raise UserError(
            f"strategy.backend={name!r} is not installed",
            f"registered are {', '.join(sorted(registered()))}",
            "choose one of them, or install the distribution that brings it",
        )
    try:
        backend: type[Backend] = found.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"strategy.backend={name!r} cannot be loaded from {found.value}",
            f"{type(error).__name__}: {error}",
            "install what it needs, or choose another backend",
        ) from error
    if problems := backend.check(config, group.size() if group is not None else 1):
        raise ConfigError(problems)
    return backend(config, group)
