"""`from_pretrained` in a job whose parameters are sharded: files are read when their numbers are wanted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from distui.core.engine.job import job_config
from distui.core.sharding.start.unread import read_when_wanted
from distui.core.sharding.start.weight_files import FORMATS

_FILES = "_distui_files"


def install(module: ModuleType) -> None:
    """Have `transformers.modeling_utils` leave weights in their files until the engine or a script wants them."""
    kind: Any = module.PreTrainedModel
    load, finish = kind._load_pretrained_model, kind._finalize_model_loading

    def load_later(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any) -> Any:
        missing = None if args or kw or state_dict is not None else _missing(model, checkpoint_files, load_config)
        if missing is None:
            return load(model, state_dict, checkpoint_files, load_config, *args, **kw)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in missing:
                tensor._is_hf_initialized = True  # its numbers are in the files
        model.__dict__[_FILES] = checkpoint_files
        empty: Any = [set() for _ in range(2)]
        info = module.LoadStateDictInfo(
            missing_keys=missing,
            unexpected_keys=empty[0],
            mismatched_keys=empty[1],
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        return info, None

    def finish_later(model: Any, load_config: Any, loading_info: Any) -> Any:
        found = finish(model, load_config, loading_info)
        files = model.__dict__.pop(_FILES, None)
        if files is not None:
            read_when_wanted(model, files[0] if len(files) == 1 else Path(files[0]).parent)
        return found

    kind._load_pretrained_model = staticmethod(load_later)
    kind._finalize_model_loading = staticmethod(finish_later)


def _missing(model: Any, files: Any, load_config: Any) -> set[str] | None:
    """Return what of `model` is not in `files`, which is tied; None where the files must be read as ever.

    They are where anything is renamed, converted, initialised, or wanted in another format than theirs.
    """
    strategy = job_config({}).strategy
    if strategy.backend != "native" or strategy.zero_stage < 3 or not files:
        return None
    folders = {Path(file).parent for file in files}
    if len(folders) != 1 or not all(str(file).endswith(".safetensors") for file in files):
        return None
    if len(files) > 1 and not list(folders.pop().glob("*.safetensors.index.json")):
        return None
    given = ("hf_quantizer", "device_map", "device_mesh", "disk_offload_folder")
    if any(getattr(load_config, name, None) for name in given):
        return None
    expected = model.state_dict(keep_vars=True)
    if any(not isinstance(tensor, torch.nn.Parameter) or not tensor.is_meta for tensor in expected.values()):
        return None  # persistent buffers
    held: dict[str, tuple[tuple[int, ...], Any]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                held[name] = (tuple(piece.get_shape()), FORMATS.get(piece.get_dtype()))
    if any(name not in expected for name in held):
        return None
    if any(held[name] != (tuple(expected[name].shape), expected[name].dtype) for name in held):
        return None
    missing = set(expected) - set(held)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return missing if missing <= tied else None
