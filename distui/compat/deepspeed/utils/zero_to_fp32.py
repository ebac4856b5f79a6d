"""`deepspeed.utils.zero_to_fp32`: whole fp32 weights out of checkpoints, DeepSpeed's and distui's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.core.checkpoint.folder import MANIFEST
from distui.core.checkpoint.formats import deepspeed_files
from distui.core.checkpoint.weights import read_weights


def _folder(checkpoint_dir: str, tag: str | None) -> Path:
    folder = Path(checkpoint_dir)
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    return folder / tag if tag is not None else folder


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """Return the whole weights in a checkpoint of either; one process is enough."""
    folder = _folder(checkpoint_dir, tag)
    if (folder / MANIFEST).is_file() or not deepspeed_files.is_deepspeed(folder):
        return dict(read_weights(folder.absolute(), tied=True)["model0"])
    return deepspeed_files.read(folder, optimizer_states=False).weights


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: str, tag: str | None = None) -> nn.Module:
    """Load the whole weights in a checkpoint into a plain model, and return it on the CPU."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str, output_dir: str, tag: str | None = None, **kwargs: Any
) -> None:
    """Write the whole weights as `output_dir/pytorch_model.bin`; `distui checkpoint consolidate` writes safetensors."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    torch.save({name: value.clone() for name, value in state.items()}, Path(output_dir) / "pytorch_model.bin")
