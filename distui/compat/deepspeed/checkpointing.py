"""`deepspeed.checkpointing`: recomputing in backward what a function did, by torch's own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils import checkpoint as torch_checkpoint

from distui.compat.deepspeed.configuration import load_config
from distui.compat.not_offered import refused_name

_options = {"configured": False, "cpu": False}


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Keep the inputs of checkpoints in host memory if `checkpoint_in_cpu` says so; the rest needs no setting.

    Activations are cut over model-parallel ranks, of which there are none here; memory comes from torch's allocator.
    """
    table: Mapping[str, Any] = {}
    if deepspeed_config is not None:
        table = load_config(deepspeed_config).get("activation_checkpointing") or {}
    in_cpu = table.get("cpu_checkpointing", False) if checkpoint_in_cpu is None else checkpoint_in_cpu
    _options.update(configured=True, cpu=bool(in_cpu))


def is_configured() -> bool:
    """Return whether `configure` was called, or a JSON had the section."""
    return _options["configured"]


def reset() -> None:
    """Do nothing: no buffers are kept between steps."""


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `function` and forget its activations, which backward computes again (Chen et al., arXiv 1604.06174)."""
    if _options["cpu"] and not kwargs:
        # Its inputs are saved tensors only in the reentrant form.
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return torch_checkpoint.checkpoint(function, *args, use_reentrant=True)
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def non_reentrant_checkpoint(function: Any, *args: Any) -> Any:
    """Do what `checkpoint` does, in the form that takes keyword arguments and nested outputs."""
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)


get_cuda_rng_tracker = refused_name(
    "deepspeed",
    "checkpointing.get_cuda_rng_tracker",
    "torch's checkpoint restores the random state itself",
)
model_parallel_cuda_manual_seed = refused_name(
    "deepspeed", "checkpointing.model_parallel_cuda_manual_seed", "call torch.manual_seed(seed)"
)
