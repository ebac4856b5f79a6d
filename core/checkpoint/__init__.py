"""Checkpoints that reshard: any stage and any number of ranks loads what another saved, and reading one runs no code.

Way in: `Saver` saves and loads for an engine; `formats.opening.open_checkpoint` reads without one; `save_model`
writes weights for others. `folder` says which files are ours and how a new checkpoint takes the place of an old one,
`layout` where tensors lie, `plain` how a script's own states become JSON. `trained.Trained` is all that this room
asks of an engine: it must not know a backend or the engine above.
"""

from distui.core.checkpoint.export import save_model
from distui.core.checkpoint.saver import Saver

__all__ = ["Saver", "save_model"]
