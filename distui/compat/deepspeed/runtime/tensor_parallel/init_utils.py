"""DeepSpeed's tensor parallelism: `initialize` has the engine cut the model by its plan; until then it stays whole."""

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


_told: dict[str, Any] = {}
"""What `record_tp_model_init_args` was given: one size and format a process, as with DeepSpeed."""
_SIZE = "_distui_tp_size"


def record_tp_model_init_args(tp_size: int, dtype: Any, tp_group: Any = None, dist_module: Any = None) -> None:
    """Keep the size for the coming `initialize`.

    Raises: NotOffered for a group of the script's; ValueError for another size or format than before.
    """
    if tp_group is not None:
        raise NotOffered(
            "tp_model_init(tp_group=...) is not offered by distui",
            "the engine makes the groups of all axes itself: ranks that share matrices are neighbours",
            "leave tp_group out",
        )
    given = {"tp_size": tp_size, "dtype": dtype}
    if _told and _told != given:
        raise ValueError("Conflicting tp_model_init arguments detected across multiple calls.")
    _told.update(given)


def tp_model_init(model: nn.Module, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any) -> nn.Module:
    """Return the model as it is; `initialize` cuts it over `tp_size` ranks, by its plan (docs/parallelism.md).

    Raises: NotOffered for a group of the script's.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size} is no number of ranks")
    record_tp_model_init_args(tp_size, dtype, kwargs.get("tp_group"))
    _told.clear()  # it is kept with the model
    vars(model)[_SIZE] = tp_size
    return model


def axes_of(model: nn.Module) -> dict[str, int]:
    """Return the sizes of axes that the script said of `model`, for `configuration.settle`."""
    size = vars(model).get(_SIZE, _told.get("tp_size"))
    return {"tensor": size} if size is not None else {}


def merge_tp_model_init_into_config(
    config_dict: dict[str, Any], mpu: Any = None, mesh_param: Any = None, dist_module: Any = None
) -> None:
    """Write the recorded size into a JSON. Raises: ValueError for another size there."""
    if not _told:
        return
    section = config_dict.setdefault("tensor_parallel", {})
    if (size := section.setdefault("autotp_size", _told["tp_size"])) != _told["tp_size"]:
        raise ValueError(
            f"Conflicting tensor_parallel.autotp_size in config ({size}) and tp_model_init ({_told['tp_size']})."
        )


def set_autotp_mode(training: bool = False) -> None:
    """Nothing: it says what `tp_model_init` divides for, and nothing is divided."""
