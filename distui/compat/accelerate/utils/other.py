"""Saving objects, looking through wrappers, and what else scripts use."""

from __future__ import annotations

import json
import os
import socket
from functools import reduce as fold
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.state import PartialState


def wait_for_everyone() -> None:
    """Return when every rank has called it. Collective."""
    PartialState().wait_for_everyone()


def is_compiled_module(module: nn.Module) -> bool:
    """Return whether `torch.compile` wrapped this module."""
    return hasattr(module, "_orig_mod")


def has_compiled_regions(module: nn.Module) -> bool:
    """Return whether a part of this module was wrapped by `torch.compile`."""
    return any(is_compiled_module(part) for part in module.modules() if part is not module)


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compile, in place, every block that is repeated in a ModuleList; everything where there is none."""
    blocks = [
        block
        for part in module.modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(block) for block in part}) == 1
        for block in part
    ]
    for block in blocks or [module]:
        block.compile(**compile_kwargs)
    return module


compile_regions_deepspeed = compile_regions_fsdp2 = compile_regions


def model_has_dtensor(model: nn.Module) -> bool:
    """Return whether a parameter is a DTensor."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(param, DTensor) for param in model.parameters())


def get_model_tp_size(model: nn.Module) -> int | None:
    """Return the ranks that share each matrix, where the model says so."""
    if (size := getattr(model, "tp_size", None)) is not None:
        return int(size)
    told = getattr(getattr(model, "config", None), "distributed_config", None)  # where transformers 5 keeps it
    found = told.get("tp_size") if isinstance(told, dict) else getattr(told, "tp_size", None)
    return int(found) if found else None


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> nn.Module:
    """Return the model without the wrappers of other libraries; distui does not wrap.

    A compiled one stays so unless `keep_torch_compile` is False; `recursive` goes into children too.
    """
    compiled: Any = model if is_compiled_module(model) else None
    if compiled is not None:
        model = compiled._orig_mod
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if recursive:
        model = _without_wrappers(model)
    if compiled is None or not keep_torch_compile:
        return model
    compiled._orig_mod = model
    unwrapped: nn.Module = compiled
    return unwrapped


def _without_wrappers(module: nn.Module) -> nn.Module:
    inner = getattr(module, "module", None)
    module = _without_wrappers(inner) if isinstance(inner, nn.Module) else module
    for name, child in module.named_children():
        setattr(module, name, _without_wrappers(child))
    return module


def clean_state_dict_for_safetensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a state without names that share another's memory, each contiguous."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    cleaned = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        cleaned[name] = tensor.contiguous()
    return cleaned


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Write `obj` on rank 0 (or each node's first rank): with `torch.save`, or as safetensors."""
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(clean_state_dict_for_safetensors(obj), str(f), metadata={"format": "pt"})
    else:
        torch.save(obj, f)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Read what `save` wrote: tensors and plain containers, unless `weights_only=False` is given."""
    return torch.load(f, map_location=map_location, **kwargs)


def get_pretty_name(obj: Any) -> str:
    """Return the name of a class, function, or of an object's class."""
    named = obj if hasattr(obj, "__qualname__") or hasattr(obj, "__name__") else type(obj)
    return str(getattr(named, "__qualname__", None) or getattr(named, "__name__", named))


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Put `source` into `destination`, tables into tables."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def is_port_in_use(port: int | None = None) -> bool:
    """Return whether something listens on a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(("localhost", 29500 if port is None else port)) == 0


def convert_bytes(size: float) -> str:
    """Return bytes as readable text."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def recursive_getattr(obj: Any, attr: str) -> Any:
    """Return the attribute at a dotted path."""
    return fold(getattr, attr.split("."), obj)


def get_module_children_bottom_up(model: nn.Module, return_fqns: bool = False) -> list[Any]:
    """Return every module, children before their parents."""
    named = list(model.named_modules())[::-1]
    return [(name, module) for name, module in named] if return_fqns else [module for _, module in named]


def write_basic_config(mixed_precision: str = "no", save_location: Any = None) -> Any:
    """Write Accelerate's configuration of this machine as JSON, for `distui config import` and for Accelerate.

    Returns its path, or False where there is one already. Raises ValueError for another format than Accelerate's.
    """
    if save_location is None:
        cache = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
        save_location = Path(cache) / "accelerate" / "default_config.json"
    path = Path(save_location)
    if path.exists():
        print(f"Configuration already exists at {path}, will not override. Pass a different `save_location`.")
        return False
    if mixed_precision.lower() not in ("no", "fp16", "bf16", "fp8"):
        raise ValueError(
            f"`mixed_precision` should be one of 'no', 'fp16', 'bf16', or 'fp8'. Received {mixed_precision.lower()}"
        )
    num_gpus = torch.cuda.device_count()
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU" if num_gpus > 1 else "NO",
        "enable_cpu_affinity": False,
        "mixed_precision": mixed_precision.lower(),
        "num_processes": num_gpus or 1,
        "use_cpu": not num_gpus,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def check_os_kernel() -> None:
    """Do nothing: `distui doctor` tells what is wrong with a machine."""


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.other", {}, name)
