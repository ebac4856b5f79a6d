"""`deepspeed.runtime.zero`."""

from __future__ import annotations

from distui.compat.deepspeed.zero import GatheredParameters, Init, TiledLinear, register_external_parameter

__all__ = ["GatheredParameters", "Init", "TiledLinear", "register_external_parameter"]
