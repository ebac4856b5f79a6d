"""`deepspeed.runtime.activation_checkpointing.checkpointing`."""

from __future__ import annotations

from distui.compat.deepspeed.checkpointing import checkpoint, configure, is_configured, reset

__all__ = ["checkpoint", "configure", "is_configured", "reset"]
