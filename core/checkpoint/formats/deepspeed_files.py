"""Reads DeepSpeed's ZeRO checkpoints (0.10 to 0.19), without DeepSpeed and without running what is pickled in them.

<dir>/latest                                            the tag, such as global_step100
<dir>/<tag>/mp_rank_00_model_states.pt                  stage 0 to 2: module, shapes, counters, the script's state
<dir>/<tag>/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3
<dir>/<tag>/*zero_pp_rank_R_mp_rank_00_optim_states.pt  fp32 weights and optimizer states of rank R, flat

Stages 1 and 2 cut each parameter group's flat vector into one piece a rank. Stage 3 cuts each parameter, padded, into
one piece a rank, and lays a rank's pieces one after another over all its groups (deepspeed/utils/zero_to_fp32.py).
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import numpy.dtypes
import torch
from numpy._core.multiarray import _reconstruct as _numpy_reconstruct
from numpy._core.multiarray import scalar as _numpy_scalar
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from distui.core.errors import UserError

_OWN_KEYS = {"module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"}
_OWN_KEYS |= {"frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps"}
_OWN_KEYS |= {"global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "autoep_layers"}
_OWN_KEYS |= {"checkpoint_parallel_dimensions", "sparse_tensor_module_names", "csr_tensor_module_names"}
_OWN_KEYS |= {"ds_autoep_layers", "tp_world_size", "pp_world_size", "ep_world_size", "sp_world_size"}


class Foreign:
    """Stands for an object of a class that is not torch's: only remembers what it was made of."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


_KNOWN: list[Any] = [
    argparse.Namespace,
    *(getattr(numpy.dtypes, name) for name in numpy.dtypes.__all__ if name.endswith("DType")),
    numpy.dtype,
    numpy.ndarray,
    (numpy.generic, "numpy.generic"),
    *(
        (function, f"numpy.{room}.multiarray.{name}")
        for name, function in (("scalar", _numpy_scalar), ("_reconstruct", _numpy_reconstruct))
        for room in ("core", "_core")  # before numpy 2, and from there on
    ),
]
"""What is made as it is, beside torch's own: plain containers, and numpy's numbers."""


@dataclass(slots=True)
class DeepSpeedCheckpoint:
    """What a checkpoint of DeepSpeed holds, whole, on the CPU."""

    folder: Path
    stage: int
    world_size: int
    version: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameters in fp32 where DeepSpeed kept them so, and buffers."""
    tied: dict[str, str] = field(default_factory=dict)
    """Further name of a parameter -> its first."""
    frozen: frozenset[str] = frozenset()
    """Parameters that were not trained."""
    optimizer_states: dict[str, torch.Tensor] = field(default_factory=dict)
    """By `<parameter>.<state>`; empty at stage 0, where DeepSpeed keeps no names."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Hyper-parameters of the optimizer's groups."""
    lr_scheduler: dict[str, Any] | None = None
    client_state: dict[str, Any] = field(default_factory=dict)
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0


def is_deepspeed(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of DeepSpeed, or names one in `latest`."""
    if any(folder.glob("*_model_states.pt")):
        return True
    latest = folder / "latest"
    return latest.is_file() and any((folder / latest.read_text().strip()).glob("*_model_states.pt"))


def read(folder: Path, *, optimizer_states: bool = True) -> DeepSpeedCheckpoint:
    """Return what is in `folder`, a tag's or the one above it, whose `latest` then names the tag.

    Raises: UserError for files that are missing, or a layout that is not read (tensor or pipeline parallel).
    """
    if not any(folder.glob("*_model_states.pt")) and (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text().strip()
    files = _by_rank(folder, "model_states")
    if not files:
        raise UserError(f"{folder} is no checkpoint of DeepSpeed", "it has no *_model_states.pt", "name another folder")
    models = [_load(path) for path in files]
    main = models[0]
    shards = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "optim_states")]
    stage = _number(shards[0].get("zero_stage", 0)) if shards else 0
    world_size = _world_size(folder, shards, main)
    found = DeepSpeedCheckpoint(folder, stage, world_size, str(main.get("ds_version") or "?"))
    buffers = set(main.get("buffer_names") or ())
    module = main["module"]
    found.weights = {name: value for name, value in module.items() if stage < 3 or name in buffers}
    found.tied = dict(main.get("shared_params") or {})
    found.frozen = frozenset(main.get("frozen_param_shapes") or ())
    if stage in (1, 2):
        _read_flat(found, main, shards, optimizer_states)
    elif stage == 3:
        _read_pieces(found, models, shards, optimizer_states)
    for name, first in found.tied.items():
        if first in found.weights:
            found.weights[name] = found.weights[first]
    if stage == 0:
        _find_ties(found)
        groups = (main.get("optimizer") or {}).get("param_groups", [])
    else:
        groups = _base(shards[0]).get("param_groups", [])
    found.groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    found.lr_scheduler = main.get("lr_scheduler")
    found.client_state = {key: value for key, value in main.items() if key not in _OWN_KEYS}
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(found, name, int(main.get(name) or 0))
    return found


def _load(path: Path) -> dict[str, Any]:
    """Read a file of torch.save by its restricted reader, which runs nothing; unknown classes become `Foreign`."""
    try:
        with safe_globals(_KNOWN):
            unknown = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([*_KNOWN, *((_stand_in(name), name) for name in unknown)]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        told = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""]
        fix = "copy it again; where a client_state holds more than plain data, save it without"
        raise UserError(f"{path} cannot be read", f"{type(error).__name__}: {told[0]}", fix) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is no checkpoint of DeepSpeed", f"it holds a {type(loaded).__name__}", "name another")
    return loaded


def _stand_in(name: str) -> type[Foreign]:
    return type(name.rpartition(".")[2], (Foreign,), {"__module__": name.rpartition(".")[0]})


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind in the order of ranks."""
    found = sorted(folder.glob(f"*_{kind}.pt"))
    for path in found:
        match = re.search(r"mp_rank_(\d+)", path.name)
        if match is None or int(match[1]):
            raise UserError(
                f"{path.name} belongs to a model that was cut over ranks",
                "tensor- and pipeline-parallel checkpoints are not read",
                "convert it with DeepSpeed's ds_to_universal.py, or save with a tensor-parallel size of 1",
            )
    return sorted(found, key=lambda path: int((re.search(r"zero_pp_rank_(\d+)", path.name) or [0, -1])[1]))


def _number(value: Any) -> int:
    return int(value.args[0]) if isinstance(value, Foreign) else int(value)


def _world_size(folder: Path, shards: list[dict[str, Any]], main: dict[str, Any]) -> int:
    if not shards:
        return int(main.get("dp_world_size") or 1)
    count = shards[0].get("partition_count", len(shards))
    world_size = max(count) if isinstance(count, (list, tuple)) else int(count)
    if world_size != len(shards):
        raise UserError(
            f"{folder} is not whole",
            f"{world_size} ranks saved it, and {len(shards)} *_optim_states.pt are there",
            "copy the files of all nodes into one folder",
        )
    return world_size


def _base(shard: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the optimizer itself."""
    found = shard.get("base_optimizer_state", shard.get("optimizer_state_dict")) or {}
    return found if isinstance(found, dict) else {"state": dict(enumerate(found)), "param_groups": []}


def _numel(shape: Any) -> int:
    return math.prod(int(length) for length in shape)


def _read_flat(found: DeepSpeedCheckpoint, main: dict[str, Any], shards: list[dict[str, Any]], states: bool) -> None:
    """Stages 1 and 2: each group is one vector, cut into a piece a rank."""
    paddings = shards[0].get("param_alignment_paddings")
    for index, shapes in enumerate(main["param_shapes"]):
        pieces = [shard["single_partition_of_fp32_groups"][index] for shard in shards]
        vectors = {"": torch.cat([piece.reshape(-1) for piece in pieces])}
        per_rank = [_base(shard)["state"].get(index, {}) for shard in shards] if states else [{}]
        for key, value in per_rank[0].items():
            if isinstance(value, torch.Tensor) and value.dim():
                vectors[key] = torch.cat([state[key].reshape(-1) for state in per_rank])
        offset = 0
        for number, (name, shape) in enumerate(shapes.items()):
            numel = _numel(shape)
            for key, vector in vectors.items():
                if offset + numel > vector.numel():
                    raise UserError(
                        f"{found.folder} does not fit together",
                        f"{name} ends at {offset + numel}, group {index} has {vector.numel()} values",
                        "copy all files again",
                    )
                _keep(found, name, key, vector[offset : offset + numel].view(tuple(shape)))
            _keep_numbers(found, name, per_rank[0])
            offset += numel + (paddings[index][number] if paddings else 0)


def _read_pieces(
    found: DeepSpeedCheckpoint, models: list[dict[str, Any]], shards: list[dict[str, Any]], states: bool
) -> None:
    """Stage 3: each parameter is cut into a piece a rank."""
    ranks = len(shards)
    vectors: dict[str, list[torch.Tensor]] = {
        "": [torch.cat([flat.reshape(-1) for flat in shard["fp32_flat_groups"]]) for shard in shards]
    }
    numbers: dict[str, Any] = {}
    if states:
        bases = [_base(shard)["state"] for shard in shards]
        numbers = dict(bases[0].get(0, {}))
        for key, value in numbers.items():
            if isinstance(value, torch.Tensor) and value.dim():
                vectors[key] = [torch.cat([base[i][key].reshape(-1) for i in sorted(base)]) for base in bases]
    offset = 0
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
    for name, shape in shapes.items():
        numel = _numel(shape)
        each = -(-numel // ranks)
        for key, rank_vectors in vectors.items():
            whole = torch.cat([vector[offset : offset + each] for vector in rank_vectors])[:numel]
            _keep(found, name, key, whole.view(tuple(shape)))
        _keep_numbers(found, name, numbers)
        offset += each
    if offset != vectors[""][0].numel():
        raise UserError(
            f"{found.folder} does not fit together",
            f"its parameters take {offset} values a rank, and a rank has {vectors[''][0].numel()}",
            "copy all files again",
        )
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        pieces = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
        found.weights[name] = torch.cat(pieces)[: _numel(shape)].view(tuple(shape))


def _keep(found: DeepSpeedCheckpoint, name: str, key: str, value: torch.Tensor) -> None:
    if key:
        found.optimizer_states[f"{name}.{key}"] = value
    else:
        found.weights[name] = value


def _keep_numbers(found: DeepSpeedCheckpoint, name: str, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and not value.dim()):
            found.optimizer_states[f"{name}.{key}"] = torch.as_tensor(value, dtype=torch.float32)


def _find_ties(found: DeepSpeedCheckpoint) -> None:
    """Stage 0 says nothing of tied parameters; they share their memory in the file."""
    first: dict[tuple[int, int, Any], str] = {}
    for name, value in found.weights.items():
        if value.numel():
            place = (value.untyped_storage().data_ptr(), int(value.storage_offset()), tuple(value.shape))
            if place in first:
                found.tied[name] = first[place]
            first.setdefault(place, name)
