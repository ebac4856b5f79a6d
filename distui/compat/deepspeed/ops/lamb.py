"""`deepspeed.ops.lamb`."""

from __future__ import annotations

from distui.compat.deepspeed.optim.lamb import FusedLamb

__all__ = ["FusedLamb"]
__path__: list[str] = []  # its files can be imported by their own paths (refusals.ALIASES)
