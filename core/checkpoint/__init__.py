"""Checkpoints that reshard: any stage and any number of ranks loads what another saved."""

from distui.core.checkpoint.export import save_model
from distui.core.checkpoint.saver import Saver
from distui.core.checkpoint.state import load

__all__ = ["Saver", "load", "save_model"]
