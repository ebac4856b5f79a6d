"""`deepspeed.runtime.engine`."""

from __future__ import annotations

from distui.compat.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
