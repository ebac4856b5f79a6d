"""Whole weights out of a checkpoint, in one process and without an engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_weights(source: Path, manifest: Mapping[str, object]) -> dict[str, dict[str, torch.Tensor]]:
    """Return parameters and buffers by model (`model0`, ...) and name; `manifest` is what `verify(source)` gave."""
    shapes: dict[str, list[int]] = {**manifest["shapes"], **manifest["buffer_shapes"]}  # type: ignore[dict-item]
    models: dict[str, dict[str, torch.Tensor]] = {}
    for key, found in dcp.FileSystemReader(source).read_metadata().state_dict_metadata.items():
        model, _, name = key.partition(".")
        if model.startswith("model") and isinstance(found, TensorStorageMetadata):
            models.setdefault(model, {})[name] = torch.empty(found.size, dtype=found.properties.dtype)
    wanted = {f"{model}.{name}": tensor for model, tensors in models.items() for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(wanted, checkpoint_id=source, no_dist=True)
    return {
        model: {name: tensor.view(shapes[f"{model}.{name}"]) for name, tensor in tensors.items()}
        for model, tensors in models.items()
    }
