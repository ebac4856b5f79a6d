"""`deepspeed.ops.lion`."""

from __future__ import annotations

from distui.compat.deepspeed.optimizers import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
