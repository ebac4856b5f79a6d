"""What of DeepSpeed's API is not offered: each name raises where it is used, and says the way around."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distui.compat.not_offered import refuse_modules, refused_name

PAGE = "docs/coming-from-deepspeed.md"
FACE = "distui.compat.deepspeed"

_INFERENCE = "distui trains; serve with vLLM or transformers' generate, from `distui checkpoint consolidate`'s weights"
_PIPELINE = "use PipelineModule: the engine runs its stages by strategy.pipeline_schedule"
_KERNELS = "engine.engine.use_kernels(engine.module) puts kernels into the modules that it knows (docs/kernels.md)"
_TP = "choose strategy.tensor_parallel in distui's settings where it is available"
_SEQUENCE = "sequence.layer.DistributedAttention; runtime.sequence_parallel.ulysses_sp for transformers' models"
_FLOPS = "`distui launch --profile-flops` prints FLOPs and time of every module; flops_profiler.enabled does so too"
_TUNING = "ask `distui plan` which stage and micro-batch fit"
_COMPRESSION = "quantize with torchao; gradients on the wire with compression.gradients in distui's settings"

NAMES: dict[str, str] = {
    **dict.fromkeys(("init_inference", "InferenceEngine", "DeepSpeedInferenceConfig"), _INFERENCE),
    **dict.fromkeys(("default_inference_config", "DeepSpeedHybridEngine"), _INFERENCE),
    **dict.fromkeys(("DualPipeVEngine", "DualPipeVModule"), _PIPELINE),
    **dict.fromkeys(("DeepSpeedTransformerLayer", "DeepSpeedTransformerConfig", "replace_transformer_layer"), _KERNELS),
    **dict.fromkeys(("revert_transformer_layer", "module_inject", "HAS_TRITON"), _KERNELS),
}
"""Name -> the way around, for every public name of `deepspeed` 0.19 that is not offered."""

MODULES: dict[str, str] = {
    "inference": _INFERENCE,
    "runtime.pipe.dualpipev": _PIPELINE,
    "sequence": _SEQUENCE,
    "runtime.sequence_parallel": _SEQUENCE,
    "module_inject": _TP,
    "autotuning": _TUNING,
    "profiling": _FLOPS,
    "compression": _COMPRESSION,
    "linear": "use peft's LoRA layers",
    "monitor": "the JSON's tensorboard, wandb and csv_monitor sections; engine.monitor.write_events(...)",
    "launcher": "`distui launch --as deepspeed` reads the launcher's flags and the hostfile",
    "elasticity.elastic_agent": "`distui launch --nodes 2:4 --max-restarts 3` restarts on fewer and more nodes",
    "checkpoint": "engine.load_checkpoint reads DeepSpeed's folders, `distui checkpoint consolidate` too",
    "nvme": "`distui doctor` measures the disk",
    "io": "`distui doctor` measures the disk",
    "model_implementations": _INFERENCE,
    "ops.transformer": _KERNELS,
    "ops.sparse_attention": "use torch.nn.attention.flex_attention",
    "ops.op_builder": "nothing is compiled: distui has no op to build",
    "ops.aio": "`distui doctor` measures the disk",
    "runtime.data_pipeline.data_sampling": "order and sample the data in the script's own sampler",
    "runtime.compression": _COMPRESSION,
    "runtime.fp16": "fp16.enabled in the JSON; the loss scale is engine.loss_scale()",
    "runtime.hybrid_engine": _INFERENCE,
    "runtime.config": "distui.compat.deepspeed.configuration.settle checks a JSON",
}
"""Module of deepspeed, without that name -> the way around."""

_NEEDS = "pip install deepspeed: the real one's names are then used, which need no engine"
THEIRS = [
    "constants",
    "runtime.constants",
    "runtime.config_utils",
    "runtime.zero.config",
    "runtime.zero.offload_config",
    "runtime.zero.leaf_module_config",
    "runtime.activation_checkpointing.config",
    "runtime.precision_config",
    "monitor.config",
    "utils.timer",
    "utils.exceptions",
    "utils.types",
    "utils.config",
    "utils.bwc",
    "runtime.swap_tensor.constants",
    "runtime.swap_tensor.aio_config",
    "runtime.chunked_cross_entropy",
    "runtime.sparse_tensor",
    "git_version_info",
]
"""Modules of constants, settings and clocks: the installed DeepSpeed's own."""
MODULES.update(dict.fromkeys(THEIRS, _NEEDS))

ALIASES: dict[str, str] = {
    "accelerator.real_accelerator": "accelerator",
    **dict.fromkeys(("comm.comm", "comm.torch", "comm.reduce_op", "comm.utils"), "comm"),
    **dict.fromkeys(("ops.adam.fused_adam", "ops.adam.cpu_adam"), "ops.adam"),
    **dict.fromkeys(("ops.lion.fused_lion", "ops.lion.cpu_lion"), "ops.lion"),
    **dict.fromkeys(("elasticity.elasticity", "elasticity.config", "elasticity.constants"), "elasticity"),
    **{
        f"runtime.data_pipeline.data_routing.{name}": "runtime.data_pipeline.data_routing"
        for name in ("helper", "scheduler", "basic_layer")
    },
    "ops.lamb.fused_lamb": "ops.lamb",
    "ops.adagrad.cpu_adagrad": "ops.adagrad",
    **dict.fromkeys(("runtime.fp16.onebit", "runtime.fp16.onebit.zoadam"), "optim.zero_one_adam"),
    **dict.fromkeys(("utils.init_on_device", "utils.nvtx"), "utils"),
    **dict.fromkeys(("runtime.zero.stage3", "runtime.zero.stage_1_and_2"), "runtime.base_optimizer"),
    **dict.fromkeys(("runtime.bf16_optimizer", "runtime.fp16.fused_optimizer"), "runtime.base_optimizer"),
    "runtime.fp16.unfused_optimizer": "runtime.base_optimizer",
    **dict.fromkeys(("runtime.zero.muon", "runtime.zero.muon.muon_optimizer"), "optim.muon"),
}
"""Other paths of the face's own modules: DeepSpeed's files."""


def offered(table: dict[str, str], name: str) -> Any:
    """Return `deepspeed.NAME`: from the module that `table` names, a submodule, or what refuses.

    Raises: AttributeError where DeepSpeed has no such name either.
    """
    if name in table:
        module, _, attribute = table[name].partition(":")
        found = import_module(f"{FACE}.{module}")
        return getattr(found, attribute) if attribute else found
    if name in NAMES:
        return refused_name("deepspeed", name, NAMES[name])
    if name in MODULES:
        return refused_name("deepspeed", name, MODULES[name])
    raise AttributeError(f"distui's deepspeed has no {name!r}; {PAGE} lists what is offered")


def install_module_refusals() -> None:
    """Make imports of modules that are not offered say so."""
    refuse_modules(FACE, "deepspeed", MODULES, PAGE, THEIRS, ALIASES)
