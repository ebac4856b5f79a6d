"""`deepspeed.zero`: building models, and whole parameters between steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from distui.compat.deepspeed.configuration import load_config
from distui.compat.deepspeed.engine import ENGINES, DeepSpeedEngine
from distui.compat.not_offered import refused_name
from distui.compat.whole import gathered
from distui.core.config.imports.carried import flatten, truth

TiledLinear = refused_name("deepspeed", "zero.TiledLinear", "stage 3 gathers a block at a time: use nn.Linear")
"""Raises where it is used."""


def _dtype_of(config: Any) -> torch.dtype | None:
    if config is None:
        return None
    flat = flatten(load_config(config))
    for section, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if truth(flat.get(f"{section}.enabled", False)):
            return dtype
    return None


class Init:
    """A context in which a model is built in the JSON's format; `deepspeed.initialize` shards it.

    Each rank builds the whole model in host memory. Without `dtype` and without a JSON the default format stays, where
    DeepSpeed takes fp16: masters keep the precision that the weights are built in.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **kwargs: Any,
    ) -> None:
        self._enabled = enabled
        self._dtype = dtype or _dtype_of(config_dict_or_path if config_dict_or_path is not None else config)
        if module is not None and enabled and self._dtype is not None:
            module.to(self._dtype)
        self._before = torch.get_default_dtype()

    def __enter__(self) -> Init:
        self._before = torch.get_default_dtype()
        if self._enabled and self._dtype is not None:
            torch.set_default_dtype(self._dtype)
        return self

    def __exit__(self, *args: Any) -> None:
        torch.set_default_dtype(self._before)


def _engine_of(params: list[torch.Tensor]) -> DeepSpeedEngine | None:
    wanted = {id(param) for param in params}
    for engine in list(ENGINES):
        if any(id(param) in wanted for param in nn.Module.parameters(engine.module)):
            return engine
    return None


class GatheredParameters(AbstractContextManager[None]):
    """A context with whole parameters; what rank `modifier_rank` writes to them is kept on all ranks. Collective.

    The whole model is gathered, not only `params`. Parameters of no engine are left alone.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._params = [params] if isinstance(params, torch.Tensor) else list(params)
        self._modifier_rank, self._enabled = modifier_rank, enabled
        self._stack = ExitStack()

    def __enter__(self) -> None:
        engine = _engine_of(self._params) if self._enabled else None
        if engine is not None:
            self._stack.enter_context(gathered(engine.engine, engine.module, self._params, self._modifier_rank))

    def __exit__(self, *args: Any) -> None:
        self._stack.__exit__(*args)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Do nothing: a parameter that is used outside of its module lies in the root unit, or its block's, as it is."""


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Do nothing, as `register_external_parameter`."""


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Enter with the module and its whole parameters, to generate from. Collective."""
    if isinstance(model, DeepSpeedEngine):
        with model.engine.full_parameters(model.module):
            yield model.module
    else:
        yield model


__all__ = [
    "GatheredParameters",
    "Init",
    "TiledLinear",
    "register_external_parameter",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
]
