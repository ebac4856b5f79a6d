"""`deepspeed.ops.adam`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.optimizers import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
__path__: list[str] = []  # its files can be imported by their own paths (refusals.ALIASES)
