"""Which keys of DeepSpeed's JSON both faces obey: the rest is refused, and none is taken and ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distui.compat.not_offered import NotOffered
from distui.core.config.imports import deepspeed as reader
from distui.core.config.imports.carried import Carried, truth
from distui.core.errors import ConfigError, Problem

HANDLED = (
    "optimizer",
    "pipeline.activation_checkpoint_interval",
    "scheduler",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "activation_checkpointing",
    "checkpoint.tag_validation",
    "fp16.loss_scale",
    "fp16.hysteresis",
    "fp16.consecutive_hysteresis",
    "fp16.min_loss_scale",
    "bf16.check_grad_overflow",
    "bfloat16.check_grad_overflow",
    "dataloader_drop_last",
    "disable_python_gc",
    "gradient_clipping",
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
    "sparse_gradients",
    "train_batch_size",
    "steps_per_print",
    "dump_state",
    "curriculum_learning",
    "data_efficiency.enabled",
    "data_efficiency.data_routing",
    "elasticity",
)
"""Keys and sections with which DeepSpeed's face does what the import of a file alone cannot, or refuses by name."""

HANDLED_BY_PLUGIN = (
    "activation_checkpointing",
    "steps_per_print",
    "dump_state",
    "train_batch_size",
    "gradient_clipping",
)
"""The same for Accelerate's `DeepSpeedPlugin`; loaders, trackers and optimizers are the script's."""

_ORDER = "order the data in the script's own sampler"

_REFUSED_IF_ENABLED = {
    "amp": "set bf16.enabled or fp16.enabled",
    "torch_autocast": "set bf16.enabled, or wrap the forward in torch.autocast",
    "hybrid_engine": "train and generate with the same engine: `with deepspeed.zero.GatheredParameters(...)`",
    "progressive_layer_drop": "drop layers in the model itself",
    "data_efficiency.data_sampling": _ORDER,
    "data_efficiency.data_sampling.curriculum_learning": _ORDER,
    "data_efficiency.data_sampling.dynamic_batching": _ORDER,
    "eigenvalue": "take it out",
    "quantize_training": "take it out",
    "compression_training": "take it out; DeepSpeed 0.19.8 removed it too",
    "autotuning": "ask `distui plan` which stage and micro-batch fit",
    "nebula": "take it out; checkpoints can be written while training goes on",
    "zero_optimization.zenflow": "use offload_optimizer.device = cpu alone",
}
"""Section -> the way around, for what would change the training and is not offered."""

_ENGINES_OWN = {
    "curriculum_learning": _ORDER,
    "data_efficiency.data_routing.random_ltd": "drop tokens in the model itself",
    "elasticity": "start with as many ranks as there are; checkpoints load at any number",
}
"""The same for what only an engine of `deepspeed.initialize` obeys."""

_SWITCHED = (*_REFUSED_IF_ENABLED, *_ENGINES_OWN, "datastates", "expert_parallel", "weight_quantization")
"""Sections that DeepSpeed reads only where their `enabled` is true."""

_MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")

_AS_ABSENT: dict[str, tuple[Any, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "bf16.check_grad_overflow": (True,),
    "fp16.hysteresis": (2,),
    "fp16.min_loss_scale": (1,),
    "fp16.loss_scale": (0.0,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "tensor_parallel.autotp_size": (0, 1),
    "tensor_parallel.tp.tp_size": (1,),
}
_NOTHING: tuple[Any, ...] = (None, False, 0, "", "none", "false", reader.AUTO, [], {})


def refuse_features(flat: Mapping[str, Any], has_engine: bool = False) -> None:
    """Refuse what would change the training, by name and with a way around; less so for an engine of `initialize`.

    Raises: NotOffered.
    """
    for section, way in (_REFUSED_IF_ENABLED if has_engine else {**_REFUSED_IF_ENABLED, **_ENGINES_OWN}).items():
        if truth(flat.get(f"{section}.enabled", False)):
            raise NotOffered(
                f"DeepSpeed's {section} is not offered by distui", "the training would not be what the file asks", way
            )
    if truth(flat.get("sparse_gradients", False)):
        raise NotOffered(
            "DeepSpeed's sparse_gradients is not offered by distui",
            "gradients lie in flat dense buffers",
            "build embeddings with sparse=False",
        )
    if truth(flat.get("checkpoint.load_universal", False)):
        raise NotOffered(
            "DeepSpeed's checkpoint.load_universal is not offered by distui",
            "universal checkpoints are not read",
            "take it out: engine.load_checkpoint reads the folder itself, at any stage and number of ranks",
        )


def refuse_lost(carried: Carried, flat: Mapping[str, Any], handled: tuple[str, ...] = HANDLED) -> None:
    """Refuse every key that asks for something and that nothing here does; `handled` are those that the caller does.

    Raises: NotOffered that lists them all.
    """
    lost = [note for note in carried.notes if note.kind in ("lost", "script") and not _is_handled(note.key, handled)]
    asked = [note for note in lost if _asks(note.key, flat)]
    if asked:
        raise NotOffered(
            f"the DeepSpeed configuration asks for {', '.join(note.key for note in asked)}",
            "; ".join(f"{note.key}: {note.why}" for note in asked),
            "take what is named out of it, or leave it at DeepSpeed's default",
        )


def _is_handled(key: str, handled: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in handled)


def _asks(key: str, flat: Mapping[str, Any]) -> bool:
    value = flat.get(key)
    value = value.lower() if isinstance(value, str) else value
    absent = _AS_ABSENT.get(key, ())
    if any(value == nothing and type(value) is type(nothing) for nothing in absent):
        return False
    # What is on in DeepSpeed is asked to be off.
    is_on = any(item is True for item in absent)
    if not is_on and any(value == nothing and type(value) is type(nothing) for nothing in _NOTHING):
        return False
    if key.endswith(("offload_param.device", "offload_optimizer.device")):
        return False  # DeepSpeed ignores it too: the stage shards nothing of the kind
    switch = next((section for section in _SWITCHED + _MONITORS if key.startswith(f"{section}.")), None)
    return switch is None or f"{switch}.enabled" not in flat or bool(truth(flat[f"{switch}.enabled"]))


def check_reduction(flat: Mapping[str, Any], stage: int) -> None:
    """Check how gradients are reduced.

    Raises: ConfigError for what DeepSpeed refuses too, and for a sum of gradients that are divided besides.
    """
    key = "gradient_allreduce_op"
    wanted = str(flat.get(key, "mean")).lower()
    if wanted not in ("mean", "sum", reader.AUTO):
        raise ConfigError([Problem(key, f"{wanted!r} is no reduction", "DeepSpeed has mean and sum", "write mean")])
    if wanted == "sum" and stage == 3:
        raise ConfigError([Problem(key, "sum at stage 3", "DeepSpeed refuses it with stage 3 too", "write mean")])
    divides = "gradient_predivide_factor"
    if wanted == "sum" and truth(flat.get("prescale_gradients", False)) and flat.get(divides, 1.0) != 1.0:
        why = "DeepSpeed then neither sums nor averages"
        raise ConfigError([Problem(divides, f"{flat[divides]} with {key} = sum", why, "take it out")])
