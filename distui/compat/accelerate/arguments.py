"""What `Accelerator(...)` was called with, as sections of distui's configuration; the rest is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from distui.compat.accelerate import beside
from distui.compat.accelerate.refusals import NotOffered, refuse_argument
from distui.compat.accelerate.utils.axes import ParallelismConfig
from distui.compat.accelerate.utils.dataclasses import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
)
from distui.compat.accelerate.utils.enums import DDPCommunicationHookType, PrecisionType
from distui.compat.accelerate.utils.environment import str_to_bool
from distui.compat.accelerate.utils.megatron_lm import MegatronLMPlugin
from distui.compat.accelerate.utils.plugins import DeepSpeedPlugin, FullyShardedDataParallelPlugin, Sections
from distui.compat.accelerate.utils.recipes import Fp8Recipe
from distui.core.config.schema import Config

_TO_DTYPE = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_FROM_DTYPE = {dtype: name for name, dtype in _TO_DTYPE.items()}


@dataclass
class Handlers:
    """The kwargs handlers by kind."""

    ddp: DistributedDataParallelKwargs | None = None
    scaler: GradScalerKwargs | None = None
    init: InitProcessGroupKwargs | None = None
    autocast: AutocastKwargs | None = None
    profile: ProfileKwargs | None = None


_KINDS: dict[type, str] = {
    DistributedDataParallelKwargs: "ddp",
    GradScalerKwargs: "scaler",
    InitProcessGroupKwargs: "init",
    AutocastKwargs: "autocast",
    ProfileKwargs: "profile",
}


def sort_handlers(kwargs_handlers: Any) -> Handlers:
    """Return the handlers by kind.

    Raises: NotOffered for what distui cannot do; ValueError for two of a kind.
    """
    found = Handlers()
    for handler in kwargs_handlers or ():
        if isinstance(handler, Fp8Recipe):
            raise handler.refusal()
        if not isinstance(handler, KwargsHandler) or type(handler) not in _KINDS:
            raise refuse_argument("Accelerator", "kwargs_handlers", handler, "leave it out")
        kind = _KINDS[type(handler)]
        if getattr(found, kind) is not None:
            raise ValueError(f"You can only pass one {type(handler)} in `kwargs_handlers`.")
        setattr(found, kind, handler)
    if found.scaler is not None:
        for name, fixed in (("growth_factor", 2.0), ("backoff_factor", 0.5), ("enabled", True)):
            if getattr(found.scaler, name) != fixed:
                raise refuse_argument("GradScalerKwargs", name, getattr(found.scaler, name), f"leave it at {fixed}")
    return found


@dataclass
class Settled:
    """What the engine is made of, and what the `Accelerator` does itself."""

    sections: Sections = field(default_factory=dict)
    accumulation: GradientAccumulationPlugin = field(default_factory=GradientAccumulationPlugin)
    mixed_precision: str = "no"
    autocast_dtype: str | None = None
    """bf16 where the weights stay in fp32 and only operations are cast, as Accelerate does."""


def settle(
    config: Config,
    mixed_precision: str | None,
    accumulation: GradientAccumulationPlugin,
    handlers: Handlers,
    plugins: list[Any],
) -> Settled:
    """Return the engine's settings: the script's arguments over the job's `config`, but for the strategy.

    A plugin's ZeRO stage and offload count where the job's own are at their defaults: `distui launch --zero` wins.
    """
    found = Settled()
    sections = found.sections
    for plugin in plugins:
        for section, values in plugin.sections().items():
            given, defaults = getattr(config, section), getattr(Config(), section)
            for key, value in values.items():
                if getattr(given, key) == getattr(defaults, key):
                    sections.setdefault(section, {}).setdefault(key, value)
    steps = accumulation.num_steps or 1
    if steps == 1:
        for plugin in plugins:
            told = getattr(plugin, "gradient_accumulation_steps", None) or getattr(plugin, "num_micro_batches", None)
            steps = int(told or steps)
    if steps == 1:
        steps = config.batch.accumulation or 1
    sections["batch"] = {"accumulation": steps} if steps > 1 else {}
    is_cut = sections.get("strategy", {}).get("pipeline_parallel", config.strategy.pipeline_parallel) > 1
    # A pipeline runs all micro-batches of a step in one call of the model.
    accumulation.num_steps = 1 if is_cut else steps
    found.accumulation = accumulation
    wanted = _precision(mixed_precision)
    stage = sections.get("strategy", {}).get("zero_stage", config.strategy.zero_stage)
    if wanted is None:
        found.mixed_precision = _FROM_DTYPE[sections.get("precision", {}).get("dtype", config.precision.dtype)]
    else:
        found.mixed_precision = wanted
        dtype = _TO_DTYPE[wanted]
        # A pipeline's call holds its backward passes, which autocast does not belong around.
        if wanted == "bf16" and stage == 0 and config.precision.dtype != "bf16" and not is_cut:
            found.autocast_dtype, dtype = "bf16", "fp32"
        sections.setdefault("precision", {})["dtype"] = dtype
    if handlers.ddp is not None and handlers.ddp.comm_hook != DDPCommunicationHookType.NO:
        backend = config.strategy.backend
        if stage != 0 or backend not in ("native", "ddp"):
            raise refuse_argument(
                "DistributedDataParallelKwargs",
                "comm_hook",
                str(handlers.ddp.comm_hook),
                f"hooks are DDP's, which holds whole states: launch with --zero 0 (it is {stage}, backend {backend}), "
                "or compress with compression.gradients in distui's config",
            )
        sections.setdefault("strategy", {}).update(
            backend="ddp", find_unused_parameters=handlers.ddp.find_unused_parameters
        )
    if handlers.scaler is not None:
        sections.setdefault("precision", {}).update(
            initial_loss_scale=handlers.scaler.init_scale, loss_scale_window=handlers.scaler.growth_interval
        )
    return found


def _precision(mixed_precision: str | None) -> str | None:
    if mixed_precision is None:
        mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if mixed_precision is None:
        return None
    wanted = str(mixed_precision)
    if wanted not in PrecisionType:
        known = [str(member) for member in PrecisionType]
        raise ValueError(f"Unknown mixed_precision mode: {wanted}. Choose between {known}")
    if wanted == "fp8":
        raise refuse_argument("Accelerator", "mixed_precision", "fp8", "use bf16")
    return wanted


def plugins_of(
    deepspeed_plugin: Any, fsdp_plugin: Any, megatron_lm_plugin: Any, torch_tp_plugin: Any, parallelism_config: Any
) -> list[Any]:
    """Return the plugins that say how to shard, those that count where they differ first.

    Raises: NotOffered for axes that the engine does not have; TypeError for what is no plugin.
    """
    found: list[Any] = []
    if isinstance(deepspeed_plugin, dict):
        if len(deepspeed_plugin) != 1:
            raise NotOffered(
                f"Accelerator(deepspeed_plugins=...) with {len(deepspeed_plugin)} plugins is not offered by distui",
                "one engine has one strategy",
                "make an Accelerator for each model",
            )
        deepspeed_plugin = next(iter(deepspeed_plugin.values()))
    if deepspeed_plugin is not None:
        if not isinstance(deepspeed_plugin, DeepSpeedPlugin):
            raise TypeError("`deepspeed_plugin` must be a DeepSpeedPlugin object.")
        found.append(deepspeed_plugin)
    if fsdp_plugin is not None:
        if not isinstance(fsdp_plugin, FullyShardedDataParallelPlugin):
            raise TypeError("`fsdp_plugin` must be a FullyShardedDataParallelPlugin object.")
        found.append(fsdp_plugin)
    if megatron_lm_plugin is not None:
        if not isinstance(megatron_lm_plugin, MegatronLMPlugin):
            raise TypeError("`megatron_lm_plugin` must be a MegatronLMPlugin object.")
        found.append(megatron_lm_plugin)
    if torch_tp_plugin is not None and parallelism_config is None:
        parallelism_config = ParallelismConfig(tp_size=torch_tp_plugin.tp_size)
    if parallelism_config is None and str_to_bool(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")):
        parallelism_config = ParallelismConfig()
    if parallelism_config is None and megatron_lm_plugin is None:
        parallelism_config = beside.HELD["AcceleratorState"].get("parallelism_config")  # an earlier Accelerator's
    if parallelism_config is not None:
        parallelism_config.check(int(os.environ.get("WORLD_SIZE", "1")))
        found.append(parallelism_config)
    return found
