"""What of Accelerate's API is not offered: each name raises where it is used, and says the way around."""

from __future__ import annotations

from typing import Any

from distui.compat.not_offered import NotOffered, refuse_modules, refused_name

PAGE = "docs/coming-from-accelerate.md"


def refused(name: str, way: str) -> Any:
    """Return what stands for `name`: it can be imported and asked about by `isinstance`, and raises when it is used.

    So a script that only mentions it in a branch of its own runs, and one that needs it stops with the reason.
    """
    return refused_name("accelerate", name, way)


def refuse_argument(function: str, argument: str, value: Any, way: str) -> NotOffered:
    """Return the error for an argument that would have no effect."""
    return NotOffered(f"{function}({argument}={value!r}) is not offered by distui", "it would have no effect", way)


_MEGATRON = "use strategy.tensor_parallel and strategy.pipeline_parallel of distui's config"
_FP8 = "train in bf16: mixed_precision='bf16'; fp8 is offered for gradients on the wire (compression.gradients='fp8')"
_DEVICE_MAP = (
    "distui trains; for a model larger than one device use strategy.zero_stage=3 with offload.params='cpu', "
    "for inference transformers' own device_map with Accelerate installed"
)
_FSDP = (
    "distui's own checkpoints take this place: accelerator.save_state and load_state at any stage and number of ranks,"
    " and `distui checkpoint consolidate` for one file of weights"
)
_DEEPSPEED = "choose the stage with strategy.zero_stage (`distui launch --zero N`) and pass a torch.optim optimizer"
_QUANTIZED = "load quantized models with transformers itself; distui trains what it is given"
_LAUNCH = "start scripts with `distui launch`"
_TPU = "distui runs on CPUs and CUDA or ROCm GPUs"

NAMES: dict[str, str] = {
    **dict.fromkeys(
        ("cpu_offload", "cpu_offload_with_hook", "disk_offload", "dispatch_model", "load_checkpoint_and_dispatch"),
        _DEVICE_MAP,
    ),
    **dict.fromkeys(
        ("infer_auto_device_map", "get_balanced_memory", "get_max_memory", "check_device_map"), _DEVICE_MAP
    ),
    **dict.fromkeys(("get_max_layer_size", "calculate_maximum_sizes", "load_offloaded_weights"), _DEVICE_MAP),
    **dict.fromkeys(("OffloadedWeightsLoader", "PrefixedDataset", "extract_submodules_state_dict"), _DEVICE_MAP),
    **dict.fromkeys(("load_offloaded_weight", "offload_state_dict", "offload_weight"), _DEVICE_MAP),
    **dict.fromkeys(("save_offload_index", "align_module_device", "has_offloaded_params"), _DEVICE_MAP),
    **dict.fromkeys(("check_tied_parameters_on_same_device", "check_tied_parameters_in_config"), _DEVICE_MAP),
    "prepare_pippy": "use strategy.pipeline_parallel of distui's config",
    **dict.fromkeys(
        ("MegatronLMPlugin", "MegatronEngine", "MegatronLMDummyDataLoader", "MegatronLMDummyScheduler"), _MEGATRON
    ),
    **dict.fromkeys(("MegatronLMOptimizerWrapper", "MegatronLMSchedulerWrapper", "AbstractTrainStep"), _MEGATRON),
    **dict.fromkeys(("BertTrainStep", "GPTTrainStep", "T5TrainStep"), _MEGATRON),
    **dict.fromkeys(("add_model_config_to_megatron_parser", "avg_losses_across_data_parallel_group"), _MEGATRON),
    **dict.fromkeys(("gather_across_data_parallel_groups", "megatron_lm_initialize"), _MEGATRON),
    **dict.fromkeys(("megatron_lm_prepare_data_loader", "megatron_lm_prepare_model_optimizer_scheduler"), _MEGATRON),
    **dict.fromkeys(("megatron_lm_prepare_optimizer", "megatron_lm_prepare_scheduler"), _MEGATRON),
    **dict.fromkeys(("FP8RecipeKwargs", "AORecipeKwargs", "TERecipeKwargs", "MSAMPRecipeKwargs"), _FP8),
    **dict.fromkeys(("convert_model_to_fp8_ao", "filter_first_and_last_linear_layers", "has_ao_layers"), _FP8),
    **dict.fromkeys(("apply_fp8_autowrap", "contextual_fp8_autocast", "convert_model"), _FP8),
    **dict.fromkeys(("has_transformer_engine_layers", "check_cuda_fp8_capability", "torchao_required"), _FP8),
    **dict.fromkeys(("BnbQuantizationConfig", "load_and_quantize_model", "has_4bit_bnb_layers"), _QUANTIZED),
    **dict.fromkeys(("DummyOptim", "DummyScheduler", "HfDeepSpeedConfig", "DeepSpeedEngineWrapper"), _DEEPSPEED),
    **dict.fromkeys(("DeepSpeedOptimizerWrapper", "DeepSpeedSchedulerWrapper"), _DEEPSPEED),
    **dict.fromkeys(
        ("get_active_deepspeed_plugin", "map_pytorch_optim_to_deepspeed", "GatheredParameters"), _DEEPSPEED
    ),
    **dict.fromkeys(("DeepSpeedSequenceParallelConfig", "compile_regions_deepspeed", "deepspeed_required"), _DEEPSPEED),
    **dict.fromkeys(("save_fsdp_model", "load_fsdp_model", "save_fsdp_optimizer", "load_fsdp_optimizer"), _FSDP),
    **dict.fromkeys(("merge_fsdp_weights", "fsdp2_apply_ac", "fsdp2_canonicalize_names"), _FSDP),
    **dict.fromkeys(("fsdp2_load_full_state_dict", "fsdp2_prepare_model", "compile_regions_fsdp2"), _FSDP),
    **dict.fromkeys(("fsdp2_switch_optimizer_parameters", "get_fsdp2_grad_scaler", "ensure_weights_retied"), _FSDP),
    **dict.fromkeys(("enable_fsdp_ram_efficient_loading", "disable_fsdp_ram_efficient_loading"), _FSDP),
    **dict.fromkeys(("prepare_deepspeed_cmd_env", "prepare_multi_gpu_env", "prepare_sagemager_args_inputs"), _LAUNCH),
    **dict.fromkeys(("prepare_simple_launcher_cmd_env", "prepare_tpu", "PrepareForLaunch", "_filter_args"), _LAUNCH),
    "write_basic_config": "write a config with `distui setup --yes`",
    **dict.fromkeys(("install_xla", "SageMakerDistributedType"), _TPU),
    **dict.fromkeys(("TorchTensorParallelPlugin", "TorchTensorParallelConfig"), "use ParallelismConfig(tp_size=...)"),
    "TorchContextParallelConfig": "use ParallelismConfig(cp_size=...)",
    "get_grad_scaler": "mixed_precision='fp16' scales the loss in the engine; accelerator.scaler holds its scale",
    "get_mixed_precision_context_manager": "use accelerator.autocast()",
    "set_numa_affinity": "start with numactl, or let cluster.threads_per_rank divide the cores",
    "check_cuda_p2p_ib_support": "`distui doctor` tells what this machine's GPUs and links can do",
    "get_gpu_info": "`distui doctor` tells what this machine has",
    "get_cpu_distributed_information": "use accelerator.process_index, local_process_index and num_processes",
    "rich": "import rich itself",
}
"""Name -> the way around, for every public name of `accelerate` 1.15 and `accelerate.utils` that is not offered."""

MODULES: dict[str, str] = {
    "commands": "use the `distui` command: launch, config, doctor, checkpoint",
    "hooks": _DEVICE_MAP,
    "inference": "use strategy.pipeline_parallel of distui's config",
    "parallelism_config": "from accelerate import ParallelismConfig",
    "checkpointing": "accelerator.save_state and load_state",
    "utils.megatron_lm": _MEGATRON,
    "utils.fsdp_utils": _FSDP,
    "utils.bnb": _QUANTIZED,
    "utils.ao": _FP8,
    "utils.transformer_engine": _FP8,
    "utils.offload": _DEVICE_MAP,
    "utils.launch": _LAUNCH,
    "utils.torch_xla": _TPU,
    "utils.rich": "import rich itself",
}
"""Module of accelerate, without that name -> the way around."""


def offered(module: str, table: dict[str, str], name: str) -> Any:
    """Return `name` of accelerate's `module`: from the module that `table` names, or what refuses.

    Raises: AttributeError where Accelerate has no such name either.
    """
    from importlib import import_module

    if name in table:
        return getattr(import_module(table[name]), name)
    if name in NAMES:
        return refused(name, NAMES[name])
    raise AttributeError(f"distui's {module} has no {name!r}; {PAGE} lists what is offered")


def install_module_refusals() -> None:
    """Make imports of modules that are not offered say so."""
    refuse_modules("distui.compat.accelerate", "accelerate", MODULES, PAGE)
