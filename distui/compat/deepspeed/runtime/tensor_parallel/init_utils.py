"""DeepSpeed's tensor parallelism as far as it is none: a size of 1 is taken, any other refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from distui.compat.deepspeed.configuration import load_config as load_ds_config
from distui.compat.not_offered import NotOffered

__all__ = [
    "load_ds_config",
    "merge_tp_model_init_into_config",
    "record_tp_model_init_args",
    "set_autotp_mode",
    "tp_model_init",
]


def record_tp_model_init_args(
    model: nn.Module, tp_size: int, dtype: Any, tp_group: Any = None, dist_module: Any = None
) -> None:
    """Take a size of 1, at which nothing is divided. Raises: NotOffered for another."""
    if tp_size != 1:
        raise NotOffered(
            f"tp_model_init(tp_size={tp_size}) is not offered by distui",
            "tensor parallelism is not offered by this face; distui.Engine has it as strategy.tensor_parallel",
            'shard over all ranks: "zero_optimization": {"stage": 3}',
        )


def tp_model_init(model: nn.Module, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any) -> nn.Module:
    """Return the model as it is, as DeepSpeed does until `initialize`. Raises: NotOffered for a size above 1."""
    record_tp_model_init_args(model, tp_size, dtype)
    return model


def merge_tp_model_init_into_config(config: Any, config_dict: Any, mpu: Any = None, dist_module: Any = None) -> None:
    """Nothing: of a size of 1 the configuration needs to know nothing."""


def set_autotp_mode(training: bool = False) -> None:
    """Nothing: it says what `tp_model_init` divides for, and nothing is divided."""
