"""Weights for others: safetensors with the index that Hugging Face loaders read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from distui.core.checkpoint.names import tied_names
from distui.core.checkpoint.together import Failed, together
from distui.core.checkpoint.trained import Trained
from distui.core.errors import UserError
from distui.core.paths import write_atomic

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_INDEX = "model.safetensors.index.json"


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> list[str]:
    """Write `tensors` into as many files as `max_shard_bytes` asks for, and the index where there are several.

    Returns the files' names. Tensors that share memory are written once each, so the caller drops duplicates. Each file
    is new or old at every instant; what an earlier index there named and is not written again goes.
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
    old = _names_of_index(folder)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        temporary = folder / f".{name}.tmp"
        try:
            save_file(shard, temporary, metadata={"format": "pt"})
            os.replace(temporary, folder / name)
        except SafetensorError as error:  # how it tells of a full disk
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / _INDEX, json.dumps(index, indent=2))
    elif old:
        (folder / _INDEX).unlink()
    for name in old - set(names):
        (folder / name).unlink(missing_ok=True)
    return names


def _names_of_index(folder: Path) -> set[str]:
    """Return the shards that an index in `folder` names."""
    try:
        found = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or none of this kind
        return set()
    return {name for name in found if isinstance(name, str) and _SHARD.fullmatch(name)}


def save_model(
    engine: Trained,
    model: nn.Module,
    save_directory: str,
    max_shard_size: str | int,
    group: dist.ProcessGroup | None,
) -> None:
    """Write the weights of `model` as safetensors. Collective; rank 0 writes, and all hear where it could not.

    A parameter that has several names (tied) is written under its first, as transformers does. A model that the engine
    did not prepare is written as rank 0 has it.
    """
    limit = parse_size(max_shard_size)
    prepared = any(model is known for known in engine._models)
    state = engine.get_state_dict(model, only_rank_0=True) if prepared else model.state_dict()

    def write() -> None:
        if engine.process_index:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tied = tied_names(model)
        tensors: dict[str, Any] = {
            name: value.detach().cpu()
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and name not in tied
        }
        write_safetensors(tensors, folder, limit)

    try:
        together(write, group)
    except Failed as error:
        raise UserError(f"the weights were not written to {save_directory}", str(error), "see to the disk") from None
