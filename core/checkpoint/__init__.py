"""Checkpoints that reshard: any stage and any number of ranks loads what another saved."""

from distui.core.checkpoint.export import save_model
from distui.core.checkpoint.state import load, save

__all__ = ["load", "save", "save_model"]
