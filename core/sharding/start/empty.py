"""Building models without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def init_on_device(device: Any, include_buffers: bool | None = None) -> Iterator[None]:
    """Build modules whose parameters, and with `include_buffers` buffers, are on `device`."""
    wanted = torch.device(device)
    if include_buffers:
        with wanted:
            yield
        return
    register = nn.Module.register_parameter

    def register_there(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and param.device != wanted:
            kind: Any = type(param)
            options = dict(param.__dict__)
            module._parameters[name] = kind(param.detach().to(wanted), requires_grad=param.requires_grad, **options)

    nn.Module.register_parameter = register_there  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Build modules whose parameters take no memory: they are on the meta device until `engine.prepare`.

    Buffers are made as ever, so that tables which only a constructor computes are right; with `include_buffers` they
    too are on meta, and need a module that can initialise them.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield
