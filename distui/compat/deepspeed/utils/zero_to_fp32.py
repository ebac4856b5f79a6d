"""`deepspeed.utils.zero_to_fp32`: whole fp32 weights out of checkpoints, DeepSpeed's and distui's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.compat.not_offered import NotOffered
from distui.core.checkpoint.export import parse_size, write_safetensors
from distui.core.checkpoint.folder import MANIFEST
from distui.core.checkpoint.formats import deepspeed_files
from distui.core.checkpoint.weights import read_weights
from distui.core.errors import UserError


def _folder(checkpoint_dir: str, tag: str | None) -> Path:
    folder = Path(checkpoint_dir)
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    return folder / tag if tag is not None else folder


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """Return the whole weights in a checkpoint of either, read at once in lazy mode too; one process is enough.

    Raises: NotOffered for leaving frozen parameters out of a checkpoint of distui's, which does not name them.
    """
    folder = _folder(checkpoint_dir, tag)
    if (folder / MANIFEST).is_file() or not deepspeed_files.is_deepspeed(folder):
        if exclude_frozen_parameters:
            raise NotOffered(
                "exclude_frozen_parameters for a checkpoint of distui's",
                "it holds all weights, and does not tell which of them were trained",
                "call engine.module_state_dict(exclude_frozen_parameters=True) in the script",
            )
        return dict(read_weights(folder.absolute(), tied=True)["model0"])
    found = deepspeed_files.read(folder, optimizer_states=False)
    left_out = found.frozen if exclude_frozen_parameters else frozenset()
    return {name: value for name, value in found.weights.items() if name not in left_out}


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: str, tag: str | None = None) -> nn.Module:
    """Load the whole weights in a checkpoint into a plain model, and return it on the CPU."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the whole weights in `dtype`, as `pytorch_model.bin` or, in files up to a size, as safetensors.

    Raises: UserError where a pickle would be larger than `max_shard_size`; NotOffered as the function above.
    """
    form = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    state = {name: value.to(form) if value.is_floating_point() else value for name, value in state.items()}
    num_bytes = sum(value.numel() * value.element_size() for value in state.values())
    limit = parse_size(max_shard_size) if max_shard_size is not None else num_bytes
    if not safe_serialization and num_bytes > limit:
        raise UserError(
            f"the weights are larger than max_shard_size={max_shard_size}",
            f"they take {num_bytes / 1e9:.2f} GB, and a pickle is written as one file",
            "write safetensors (--safe_serialization), or raise --max_shard_size",
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not safe_serialization:
        torch.save({name: value.clone() for name, value in state.items()}, folder / "pytorch_model.bin")
        return
    once = {value.untyped_storage().data_ptr(): name for name, value in reversed(state.items()) if value.numel()}
    names = set(once.values())
    write_safetensors(
        {name: value for name, value in state.items() if name in names or not value.numel()}, folder, limit
    )


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the whole fp32 weights, as `convert_zero_checkpoint_to_state_dict` does."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )
