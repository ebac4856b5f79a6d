"""Whole weights out of a checkpoint, in one process and without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.formats.opening import open_checkpoint


def read_weights(target: Path, *, tied: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Return parameters and buffers by model (`model0`, ...) and name, as the model's own state_dict names them.

    A weight of several names is given under its first, or with `tied` under all of them, as one tensor.

    Raises: UserError for a checkpoint that is damaged anywhere.
    """
    checkpoint = open_checkpoint(target)
    folders.verify(checkpoint.folder)
    manifest = checkpoint.manifest
    shapes: dict[str, list[int]] = {**manifest["shapes"], **manifest["buffer_shapes"]}
    left_out = set(manifest.get("transient", ()))
    names = {key: key for key in checkpoint.entries if key.startswith("model") and key not in left_out}
    if tied:
        names |= {name: first for name, first in manifest.get("tied", {}).items() if first in names}
    found: dict[str, torch.Tensor] = {}
    models: dict[str, dict[str, torch.Tensor]] = {}
    for key, first in names.items():
        if first not in found:
            found[first] = checkpoint.tensor(first).view(shapes[first])
        model, _, name = key.partition(".")
        models.setdefault(model, {})[name] = found[first]
    return models
