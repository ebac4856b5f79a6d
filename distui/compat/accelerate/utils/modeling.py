"""Looking into models and their files."""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.compat.accelerate.refusals import NAMES, offered, refuse_argument


def is_peft_model(model: nn.Module) -> bool:
    """Return whether PEFT wrapped this model."""
    return any(kind.__module__.startswith("peft.") and kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def convert_file_size_to_int(size: int | str) -> int:
    """Return bytes for 10GB, 512MiB or a number."""
    from distui.core.checkpoint.export import parse_size

    return parse_size(size)


def dtype_byte_size(dtype: Any) -> float:
    """Return the bytes of an element; an eighth for a bool."""
    if dtype is torch.bool:
        return 1 / 8
    if isinstance(dtype, torch.dtype):
        return float(dtype.itemsize)
    bits = re.search(r"(\d+)", str(dtype.value))
    if bits is None:
        raise ValueError(f"`dtype` is not a valid dtype: {dtype}.")
    return int(bits[1]) / 8


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Return what tells two storages apart: device, address, bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def named_module_tensors(
    module: nn.Module,
    include_buffers: bool = True,
    recurse: bool = False,
    remove_non_persistent: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers by name."""
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        kept = set(module.state_dict()) if remove_non_persistent else None
        for name, buffer in module.named_buffers(recurse=recurse):
            if kept is None or name in kept:
                yield name, buffer


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Return groups of names of one parameter."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: list[list[str]]) -> None:
    """Make each group of names one parameter again: the first of it that is not on the meta device."""
    for group in tied_params:
        params = [model.get_parameter(name) for name in group]
        source = next((param for param in params if param.device.type != "meta"), params[0])
        for name in group:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, source)


def set_module_tensor_to_device(
    module: nn.Module, tensor_name: str, device: Any, value: Any = None, dtype: Any = None, **kwargs: Any
) -> None:
    """Put one parameter or buffer on a device, with `value` where it is given."""
    if kwargs:
        name = next(iter(kwargs))
        raise refuse_argument("set_module_tensor_to_device", name, kwargs[name], "leave it out")
    parent, _, leaf = tensor_name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    if old.device.type == "meta" and value is None and torch.device(device).type != "meta":
        raise ValueError(f"{tensor_name} is on the meta device, we need a `value` to put in on {device}.")
    new = (old if value is None else torch.as_tensor(value)).to(device=device, dtype=dtype or old.dtype)
    if leaf in owner._buffers:
        owner._buffers[leaf] = new
    else:
        owner._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)


def compute_module_sizes(model: nn.Module, dtype: Any = None, **kwargs: Any) -> dict[str, int]:
    """Return the bytes of every module by name; the whole model is under the empty name."""
    sizes: dict[str, int] = defaultdict(int)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, tensor in named_module_tensors(model, recurse=True):
        size = int(tensor.numel() * dtype_byte_size(wanted or tensor.dtype))
        parts = name.split(".")
        for count in range(len(parts) + 1):
            sizes[".".join(parts[:count])] += size
    return dict(sizes)


def load_state_dict(checkpoint_file: Any, device_map: Any = None) -> dict[str, Any]:
    """Read weights: safetensors, or what `torch.save` wrote."""
    if str(checkpoint_file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(str(checkpoint_file))
    loaded: dict[str, Any] = torch.load(checkpoint_file, map_location="cpu", weights_only=True)
    return loaded


def load_checkpoint_in_model(
    model: nn.Module, checkpoint: Any, device_map: Any = None, dtype: Any = None, strict: bool = False, **kwargs: Any
) -> None:
    """Load weights from a file, an index, or a folder that holds one of them, into a model before `prepare`.

    With a device map the installed Accelerate does it. Raises: NotOffered where there is none.
    """
    if device_map is not None or kwargs.get("offload_folder") is not None:
        if find_spec("accelerate") is None:
            way = NAMES["load_checkpoint_and_dispatch"]
            raise refuse_argument("load_checkpoint_in_model", "device_map", "...", way)
        theirs: Any = import_module("accelerate.utils")
        theirs.load_checkpoint_in_model(model, checkpoint, device_map, dtype=dtype, strict=strict, **kwargs)
        return
    path = Path(checkpoint)
    if path.is_dir():
        indexes, files = sorted(path.glob("*.index.json")), sorted(path.glob("model.safetensors"))
        found = indexes or files or sorted(path.glob("pytorch_model.bin"))
        if not found:
            raise ValueError(f"{checkpoint} containing no model weights")
        path = found[0]
    files = [path]
    if path.name.endswith(".index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        files = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    whole: dict[str, Any] = {}
    for file in files:
        whole.update(load_state_dict(file))
    if dtype is not None:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        whole = {name: value.to(wanted) if value.is_floating_point() else value for name, value in whole.items()}
    model.load_state_dict(whole, strict=strict, assign=any(p.device.type == "meta" for p in model.parameters()))


def get_grad_scaler(distributed_type: Any = None, **kwargs: Any) -> Any:
    """Return torch's loss scaler, for a loop that scales by itself; the engine's own is `accelerator.scaler`."""
    if str(getattr(distributed_type, "value", distributed_type)) == "FSDP":
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler(**kwargs)
    return torch.amp.GradScaler("cuda", **kwargs)


def get_mixed_precision_context_manager(native_amp: bool = False, autocast_kwargs: Any = None) -> Any:
    """Return an autocast in the job's format where `native_amp`, else a context that does nothing."""
    from distui.compat.accelerate.state import AcceleratorState

    state = AcceleratorState()
    if not native_amp:
        return contextlib.nullcontext()
    options: dict[str, Any] = {} if autocast_kwargs is None else autocast_kwargs.to_kwargs()
    if dtype := {"fp16": torch.float16, "bf16": torch.bfloat16}.get(state.mixed_precision):
        options["dtype"] = dtype
    return torch.autocast(state.device.type, **options)


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.modeling", {}, name)
