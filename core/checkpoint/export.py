"""Weights for others: safetensors with the index that Hugging Face loaders read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from distui.core.errors import UserError
from distui.core.paths import write_atomic

if TYPE_CHECKING:
    from distui.core.engine import Engine

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Return bytes for `10GB`, `512MiB` or a number."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    unit = match[2] if match else None
    if unit is None or unit not in _UNITS:
        raise UserError(f"max_shard_size={text!r} is no size", "it needs a number and a unit", "write 10GB or 512MiB")
    assert match is not None
    return int(float(match[1]) * _UNITS[unit])


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> list[str]:
    """Write `tensors` into as many files as `max_shard_bytes` asks for, and the index where there are several.

    Returns the files' names. Tensors that share memory are written once each, so the caller drops duplicates.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.contiguous()
        filled += nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return ["model.safetensors"]
    weight_map: dict[str, str] = {}
    names = []
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.append(file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    return names


def save_model(engine: Engine, model: nn.Module, save_directory: str, max_shard_size: str | int) -> None:
    """Write the weights of `model` as safetensors. Collective; rank 0 writes.

    A parameter that has several names (tied) is written under its first, as transformers does.
    """
    limit = parse_size(max_shard_size)
    state = engine.get_state_dict(model, only_rank_0=True)
    if engine.is_main_process:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        first_names = {name for name, _ in nn.Module.named_parameters(model)}
        all_names = {name for name, _ in nn.Module.named_parameters(model, remove_duplicate=False)}
        tied: set[str] = all_names - first_names
        tensors: dict[str, Any] = {
            name: value for name, value in state.items() if isinstance(value, torch.Tensor) and name not in tied
        }
        write_safetensors(tensors, folder, limit)
    engine.wait_for_everyone()
