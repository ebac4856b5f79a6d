"""Accelerate's saving functions for FSDP, on the engine that runs what a FullyShardedDataParallelPlugin asks for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered, refuse_argument
from distui.compat.accelerate.state import PartialState
from distui.core.errors import UserError

MODEL = "pytorch_model_fsdp"


def _is_full(plugin: Any) -> bool:
    wanted = getattr(plugin, "state_dict_type", None)
    return "FULL" in str(getattr(wanted, "name", wanted)).upper()


def _file(folder: Any, index: int) -> Path:
    return Path(folder) / (f"{MODEL}.bin" if index == 0 else f"{MODEL}_{index}.bin")


def _folder(folder: Any, name: str) -> Path:
    return Path(folder) if Path(folder).name == name else Path(folder) / name


def save_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Any,
    model: Any,
    output_dir: Any,
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Write a prepared model's weights: one .bin for FULL_STATE_DICT, else safetensors in a folder. Collective."""
    if adapter_only:
        raise refuse_argument("save_fsdp_model", "adapter_only", True, "model.save_pretrained writes adapters")
    if not _is_full(fsdp_plugin):
        accelerator.save_model(model, str(_folder(output_dir, f"{MODEL}_{model_index}")))
        return
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(weights, _file(output_dir, model_index))
    accelerator.wait_for_everyone()


def load_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Any,
    model: Any,
    input_dir: Any,
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Give a prepared model what `save_fsdp_model` wrote, at any stage and number of ranks. Collective."""
    if adapter_only:
        raise refuse_argument("load_fsdp_model", "adapter_only", True, "model.load_adapter reads adapters")
    if _is_full(fsdp_plugin):
        weights = torch.load(_file(input_dir, model_index), map_location="cpu", weights_only=True)
        accelerator.engine.load_state_dict(model, weights)
    else:
        accelerator.engine.load_weights(model, _folder(input_dir, f"{MODEL}_{model_index}"))


def _optimizer_file(plugin: Any, folder: Any, index: int) -> Path:
    if _is_full(plugin):
        return Path(folder) / ("optimizer.bin" if index == 0 else f"optimizer_{index}.bin")
    return _folder(folder, f"optimizer_{index}") / "optimizer.bin"


def save_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Any,
    optimizer: Any,
    model: Any,
    output_dir: Any,
    optimizer_index: int = 0,
    use_dcp: bool = True,
) -> None:
    """Write an optimizer's states, whole and in the parameters' shapes, for any number of ranks. Collective."""
    states = optimizer.state_dict()
    if accelerator.is_main_process:
        file = _optimizer_file(fsdp_plugin, output_dir, optimizer_index)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(states, file)
    accelerator.wait_for_everyone()


def load_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Any,
    optimizer: Any,
    model: Any,
    input_dir: Any,
    optimizer_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Give an optimizer what `save_fsdp_optimizer` wrote, at any stage and number of ranks. Collective."""
    file = _optimizer_file(fsdp_plugin, input_dir, optimizer_index)
    if not file.is_file():
        there = sorted(path.name for path in file.parent.glob("*"))[:6]
        raise UserError(
            f"{file} is not there",
            f"its folder holds {', '.join(there) or 'nothing'}",
            "load what save_fsdp_optimizer wrote with the same plugin, or accelerator.save_state's by load_state",
        )
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def merge_fsdp_weights(
    checkpoint_dir: Any, output_path: Any, safe_serialization: bool = True, remove_checkpoint_dir: bool = False
) -> None:
    """Write the weights of `save_state` or `save_fsdp_model` as one file: model.safetensors, or pytorch_model.bin."""
    from safetensors.torch import load_file, save_file

    from distui.core.checkpoint.folder import MANIFEST
    from distui.core.checkpoint.weights import read_weights

    source = Path(checkpoint_dir).absolute()
    if not source.is_dir():
        raise ValueError(f"Tried to load from {source} but there is no such folder")
    state = PartialState()
    if state.is_main_process:
        weights: dict[str, torch.Tensor] = {}
        if (source / MANIFEST).exists():
            models = read_weights(source, tied=False)
            if len(models) != 1:
                raise UserError(
                    f"{source} holds {len(models)} models", "one file has one", "use distui checkpoint consolidate"
                )
            weights = dict(next(iter(models.values())))
        for file in sorted(source.glob("*.safetensors")) if not weights else ():
            weights.update(load_file(file))
        if not weights:
            raise ValueError(f"{source} holds no checkpoint of distui's: use `distui checkpoint consolidate`")
        target = Path(output_path)
        target.mkdir(parents=True, exist_ok=True)
        if safe_serialization:
            whole = {name: value.contiguous() for name, value in weights.items()}
            save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(weights, target / "pytorch_model.bin")
        if remove_checkpoint_dir:
            shutil.rmtree(source)
    state.wait_for_everyone()


def ensure_weights_retied(param_init_fn: Any, model: Any, device: Any) -> Any:
    """Return the function as it is: tied weights are one parameter to the engine."""
    return param_init_fn


def enable_fsdp_ram_efficient_loading() -> None:
    """Ask for what transformers does at stage 3 anyway: weights stay in their files until they are sharded."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "True"


def disable_fsdp_ram_efficient_loading() -> None:
    """Take that back."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.fsdp_utils", {}, name)
