"""`TrainingArguments(deepspeed=..., fsdp=...)` on distui's engine: what they ask for, without theirs."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from distui.compat.accelerate.utils.axes import ParallelismConfig
from distui.compat.accelerate.utils.plugins import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from distui.compat.deepspeed.configuration import load_config
from distui.compat.deepspeed.lr_schedules import build_schedule
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.core.engine.job import job_config
from distui.core.errors import UserError

_TRAINERS_OWN = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
"""What TrainingArguments say too, in the same numbers, and Trainer does itself."""
_GIVEN = "_distui_deepspeed"
"""Where TrainingArguments keep what `deepspeed=` was, which transformers itself then does not see."""


def take_deepspeed(own: Any, args: Any) -> None:
    """Around `TrainingArguments.__post_init__`: keep `deepspeed=` from starting DeepSpeed, installed or not.

    Raises: what `ParallelismConfig.check` does.
    """
    given, args.deepspeed = args.deepspeed, None
    if (axes := getattr(args, "parallelism_config", None)) is not None:
        own_parallelism(axes).check(int(os.environ.get("WORLD_SIZE", "1")))  # before anything starts
    own(args)
    if given:
        setattr(args, _GIVEN, given if isinstance(given, Mapping) else load_config(given))


def deepspeed_json(args: Any, num_steps: int | None = None) -> dict[str, Any] | None:
    """Return the JSON that `deepspeed=` named, its "auto" filled in as transformers does; None without one.

    What only the length of the training tells stays "auto" where `num_steps` is not given.

    Raises: UserError for every value that contradicts TrainingArguments.
    """
    given = getattr(args, _GIVEN, None)
    if given is None:
        return None
    filled: dict[str, Any] = copy.deepcopy(dict(given))
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    half = {"bf16": bool(args.bf16 or getattr(args, "bf16_full_eval", False)), "fp16": bool(args.fp16)}
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * num_data_ranks(args),
        "gradient_clipping": args.max_grad_norm,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.betas": [args.adam_beta1, args.adam_beta2],
        "optimizer.params.eps": args.adam_epsilon,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_max_lr": args.learning_rate,
        **{f"{name}.enabled": value for name, value in half.items()},
    }
    if num_steps is not None:
        told["scheduler.params.warmup_num_steps"] = args.get_warmup_steps(num_steps)
        told["scheduler.params.total_num_steps"] = num_steps
    wrong = []
    for key, value in told.items():
        *sections, last = key.split(".")
        table: Any = filled
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if not isinstance(table, dict) or last not in table:
            continue
        if table[last] == "auto":
            table[last] = value
        elif table[last] != value and (not key.startswith("scheduler.") or last == "warmup_max_lr"):
            wrong.append(f"{key}={table[last]} here, {value} in TrainingArguments")
    if filled.get("scheduler", {}).get("params", {}).get("warmup_min_lr") == "auto":
        filled["scheduler"]["params"]["warmup_min_lr"] = 0
    if wrong:
        raise UserError(
            "TrainingArguments(deepspeed=...) contradicts the other arguments", "; ".join(wrong), 'write "auto" there'
        )
    return filled


def plugin_of(args: Any) -> DeepSpeedPlugin | None:
    """Return what `deepspeed=` asks the engine for, or None."""
    filled = deepspeed_json(args)
    if filled is None:
        return None
    for key in _TRAINERS_OWN:
        filled.pop(key, None)
    for name, wanted in (("bf16", args.bf16), ("fp16", args.fp16)):
        if wanted:
            filled.setdefault(name, {}).setdefault("enabled", True)
    return DeepSpeedPlugin(hf_ds_config=filled)


def num_data_ranks(args: Any) -> int:
    """Return how many ranks have batches of their own, by the settings or by `parallelism_config`."""
    strategy, axes = job_config({}).strategy, getattr(args, "parallelism_config", None)
    shared = strategy.tensor_parallel * strategy.context_parallel
    if shared == 1 and axes is not None:
        shared = own_parallelism(axes).non_data_parallel_size
    return max(1, int(args.world_size) // shared)


def own_parallelism(axes: Any) -> ParallelismConfig:
    """Return the face's configuration of axes for the real Accelerate's."""
    if isinstance(axes, ParallelismConfig):
        return axes
    return ParallelismConfig(**{item.name: getattr(axes, item.name) for item in fields(ParallelismConfig)})


def own_plugin(plugin: Any) -> FullyShardedDataParallelPlugin:
    """Return the face's plugin for one of the real Accelerate's, which Trainer makes of `fsdp=`."""
    if isinstance(plugin, FullyShardedDataParallelPlugin):
        return plugin
    values: dict[str, Any] = {
        item.name: getattr(plugin, item.name, None) for item in fields(FullyShardedDataParallelPlugin)
    }
    return FullyShardedDataParallelPlugin(**values)


def create_optimizer(own: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Trainer.create_optimizer`: the JSON's optimizer counts, as with DeepSpeed."""
    section = (deepspeed_json(trainer.args) or {}).get("optimizer")
    if section and trainer.optimizer is None:
        params = [param for param in trainer.model.parameters() if param.requires_grad]
        trainer.optimizer = build_optimizer(section, params)
    return own(trainer, *args, **kwargs)


def create_scheduler(own: Any, trainer: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    """Around `Trainer.create_scheduler`: the JSON's schedule counts, as with DeepSpeed."""
    section = (deepspeed_json(trainer.args, num_training_steps) or {}).get("scheduler")
    if section and trainer.lr_scheduler is None:
        trainer.lr_scheduler = build_schedule(section, trainer.optimizer if optimizer is None else optimizer)
        trainer._created_lr_scheduler = True
    return own(trainer, num_training_steps, optimizer)
