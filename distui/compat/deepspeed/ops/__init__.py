"""`deepspeed.ops`: the optimizers that scripts build themselves. Nothing is compiled."""

from __future__ import annotations

from distui.compat.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
