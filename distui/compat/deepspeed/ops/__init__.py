"""`deepspeed.ops`: the optimizers that scripts build themselves. Nothing is compiled."""

from __future__ import annotations

from distui.compat.deepspeed.ops import adam, lion

__all__ = ["adam", "lion"]
