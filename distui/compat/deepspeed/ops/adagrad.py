"""`deepspeed.ops.adagrad`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.optimizers import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
__path__: list[str] = []  # its files can be imported by their own paths (refusals.ALIASES)
