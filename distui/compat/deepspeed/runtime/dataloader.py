"""`deepspeed.runtime.dataloader`."""

from __future__ import annotations

from distui.compat.deepspeed.loading import DeepSpeedDataLoader, RepeatingLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]
