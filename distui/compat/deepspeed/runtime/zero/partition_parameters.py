"""`deepspeed.runtime.zero.partition_parameters`."""

from __future__ import annotations

from distui.compat.deepspeed.zero import GatheredParameters, Init, register_external_parameter

__all__ = ["GatheredParameters", "Init", "register_external_parameter"]
