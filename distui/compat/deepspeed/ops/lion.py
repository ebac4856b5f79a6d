"""`deepspeed.ops.lion`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.optimizers import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
__path__: list[str] = []  # its files can be imported by their own paths (refusals.ALIASES)
