"""`deepspeed.runtime.activation_checkpointing`."""

from __future__ import annotations

from distui.compat.deepspeed import checkpointing

__all__ = ["checkpointing"]
