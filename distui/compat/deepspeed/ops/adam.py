"""`deepspeed.ops.adam`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.optimizers import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
