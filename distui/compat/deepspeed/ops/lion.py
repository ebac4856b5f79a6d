"""`deepspeed.ops.lion`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.optimizers import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
