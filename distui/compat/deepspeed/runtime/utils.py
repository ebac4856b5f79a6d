"""`deepspeed.runtime.utils`."""

from __future__ import annotations

from distui.compat.deepspeed.utils.logging import see_memory_usage

__all__ = ["see_memory_usage"]
