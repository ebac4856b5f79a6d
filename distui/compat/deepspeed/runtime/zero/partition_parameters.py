"""`deepspeed.runtime.zero.partition_parameters`."""

from __future__ import annotations

from typing import Any

from distui.compat.deepspeed.parameters import ZeroParamStatus
from distui.compat.deepspeed.zero import GatheredParameters, Init, register_external_parameter


def is_zero_param(parameter: Any) -> bool:
    """Return whether a parameter is one of an engine's at stage 3."""
    return hasattr(parameter, "ds_id")


__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "is_zero_param", "register_external_parameter"]
