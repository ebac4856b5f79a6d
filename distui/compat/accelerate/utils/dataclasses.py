"""What a script configures an `Accelerator` with: kwargs handlers and small configurations.

Fields and defaults are Accelerate's. What distui cannot do with a field is refused by the `Accelerator` that gets it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.utils.enums import (
    BaseEnum,
    ComputeEnvironment,
    CustomDtype,
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    EnumWithContains,
    FP8BackendType,
    LoggerType,
    PrecisionType,
    RNGType,
)
from distui.compat.accelerate.utils.environment import str_to_bool
from distui.compat.accelerate.utils.imports import stateful_class

__all__ = [
    "AutocastKwargs",
    "BaseEnum",
    "ComputeEnvironment",
    "CustomDtype",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DynamoBackend",
    "EnumWithContains",
    "FP8BackendType",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
    "TorchDynamoPlugin",
]


_ELSEWHERE = {
    **dict.fromkeys(("DeepSpeedPlugin", "FullyShardedDataParallelPlugin"), "plugins"),
    "MegatronLMPlugin": "megatron_lm",
    **dict.fromkeys(("AORecipeKwargs", "FP8RecipeKwargs", "MSAMPRecipeKwargs", "TERecipeKwargs"), "recipes"),
    **dict.fromkeys(("TorchContextParallelConfig", "TorchTensorParallelConfig", "ParallelismConfig"), "axes"),
    **dict.fromkeys(("TorchTensorParallelPlugin", "DeepSpeedSequenceParallelConfig"), "axes"),
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(f"distui.compat.accelerate.utils.{_ELSEWHERE[name]}"), name)
    return offered("accelerate.utils.dataclasses", {}, name)


class KwargsHandler:
    """A set of keyword arguments for something that the `Accelerator` makes."""

    def to_dict(self) -> dict[str, Any]:
        """Return every field."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        default = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if default[key] != value}


@dataclass
class AutocastKwargs(KwargsHandler):
    """Options of `torch.autocast`."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Options of DDP. Unused parameters are always found and buckets are distui's units; a `comm_hook` takes DDP."""

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.comm_hook = DDPCommunicationHookType(self.comm_hook)
        self.comm_wrapper = DDPCommunicationHookType(self.comm_wrapper)

    def hook(self) -> tuple[Any, Any] | None:
        """Return the state and the function of torch's hook, None where none is asked for."""
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        hooks: dict[Any, Any] = {
            DDPCommunicationHookType.FP16: default_hooks.fp16_compress_hook,
            DDPCommunicationHookType.BF16: default_hooks.bf16_compress_hook,
            DDPCommunicationHookType.POWER_SGD: powerSGD_hook.powerSGD_hook,
            DDPCommunicationHookType.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
        }
        wrappers: dict[Any, Any] = {
            DDPCommunicationHookType.FP16: default_hooks.fp16_compress_wrapper,
            DDPCommunicationHookType.BF16: default_hooks.bf16_compress_wrapper,
        }
        found = hooks.get(self.comm_hook)
        if found is None:
            return None
        keeps = self.comm_hook in (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD)
        state = powerSGD_hook.PowerSGDState(None, **self.comm_state_option) if keeps else None
        return state, wrappers.get(self.comm_wrapper, lambda hook: hook)(found)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """Options of fp16's loss scale."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """Options of the process group; they count for the first `Accelerator` or `PartialState` of a process."""

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.timeout is None:
            self.timeout = timedelta(seconds=600 if self.backend == "nccl" else 1800)


@dataclass
class ProfileKwargs(KwargsHandler):
    """Options of `torch.profiler.profile` for `accelerator.profile`."""

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """Return the profiler."""
        known = {activity.name.lower(): activity for activity in torch.profiler.supported_activities()}
        chosen = None if self.activities is None else [known[name] for name in self.activities]
        schedule = None if self.schedule_option is None else torch.profiler.schedule(**self.schedule_option)
        return torch.profiler.profile(
            activities=chosen,
            schedule=schedule,
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


@dataclass
class TensorInformation:
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class DataLoaderConfiguration:
    """How prepared loaders divide batches among ranks."""

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False

    def __post_init__(self) -> None:
        if self.use_stateful_dataloader:
            stateful_class()


@dataclass
class ProjectConfiguration:
    """Folders of a project, and how its saved states are named."""

    project_dir: str | os.PathLike[str] | None = None
    logging_dir: str | os.PathLike[str] | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Set `project_dir`, and `logging_dir` where it is not set."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How micro-batches make an optimizer step."""

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False


_DYNAMO = ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_REGIONAL_COMPILATION", "USE_DYNAMIC")


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """Options of `torch.compile`, which prepared models are compiled with unless the back end is NO."""

    backend: DynamoBackend | str | None = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        told = {name: os.environ.get(f"ACCELERATE_DYNAMO_{name}") for name in _DYNAMO}
        chosen = self.backend if self.backend is not None else told["BACKEND"] or "no"
        self.backend = DynamoBackend(str(chosen).upper())
        self.mode = self.mode or told["MODE"] or "default"
        for name in ("FULLGRAPH", "REGIONAL_COMPILATION", "DYNAMIC"):
            field_name = "use_regional_compilation" if name.startswith("REG") else name.lower()
            text = told[f"USE_{name}"]
            if getattr(self, field_name) is None and (text is not None or name != "DYNAMIC"):
                setattr(self, field_name, bool(str_to_bool(text or "no")))

    def to_dict(self) -> dict[str, Any]:
        """Return every field, the back end as torch names it."""
        return {**super().to_dict(), "backend": str(self.backend).lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """Return what `torch.compile` takes."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["use_regional_compilation"]
        values["backend"] = str(self.backend).lower()
        plain = {"fullgraph": False, "disable": False}  # as torch.compile has them
        return {key: value for key, value in values.items() if value is not None and plain.get(key) is not value}
