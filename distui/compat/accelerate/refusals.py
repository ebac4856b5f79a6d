"""What of Accelerate's API is not offered: each name raises where it is used, and says the way around."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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


_MEGATRON = "keep the model an nn.Module in a loop of its own; MegatronLMPlugin maps what distui's engine does"
_FSDP = (
    "distui's own checkpoints take this place: accelerator.save_state and load_state at any stage and number of ranks,"
    " and `distui checkpoint consolidate` for one file of weights"
)
_NEEDS = "pip install accelerate: the real one's function is then used, which needs no engine"

_UTILITIES = (
    "cpu_offload cpu_offload_with_hook disk_offload dispatch_model load_checkpoint_and_dispatch "
    "infer_auto_device_map get_balanced_memory get_max_memory check_device_map get_max_layer_size "
    "calculate_maximum_sizes load_offloaded_weights OffloadedWeightsLoader PrefixedDataset "
    "extract_submodules_state_dict load_offloaded_weight offload_state_dict offload_weight save_offload_index "
    "align_module_device has_offloaded_params check_tied_parameters_on_same_device check_tied_parameters_in_config "
    "BnbQuantizationConfig load_and_quantize_model has_4bit_bnb_layers convert_model_to_fp8_ao "
    "filter_first_and_last_linear_layers has_ao_layers convert_model has_transformer_engine_layers "
    "check_cuda_fp8_capability torchao_required deepspeed_required prepare_deepspeed_cmd_env prepare_multi_gpu_env "
    "prepare_sagemager_args_inputs prepare_simple_launcher_cmd_env prepare_tpu PrepareForLaunch _filter_args "
    "install_xla SageMakerDistributedType set_numa_affinity check_cuda_p2p_ib_support get_gpu_info "
    "get_cpu_distributed_information apply_fp8_autowrap contextual_fp8_autocast fsdp2_canonicalize_names "
    "get_fsdp2_grad_scaler "
)
DELEGATED: frozenset[str] = frozenset(_UTILITIES.split())
"""What works on a model or machine alone: the installed Accelerate's own is used."""

_HELPERS = (
    "attach_layerwise_casting_hooks DataLoaderAdapter test_launch move_to_device patch_optimizer_step "
    "ThreadLocalSharedDict get_module_class_from_name parse_bert_config parse_gpt2_config parse_t5_config "
    "parse_llama_config parse_glm4_moe_config CPUInformation get_driver_version override_numa_affinity "
    "check_device_same get_non_persistent_buffers compute_module_total_buffer_size clean_device_map "
    "get_module_leaves get_module_size_with_ties fallback_allocate get_state_dict_offloaded_model "
    "get_state_dict_from_offload is_torch_xpu_tensor get_shape gather_tensor_shape ConvertOutputsToFp32 "
    "is_repeated_blocks has_repeated_blocks get_free_port is_torch_distributed_available is_tqdm_available "
    "is_numpy_available get_parameters_from_modules AimTracker DVCLiveTracker SwanLabTracker"
)
HELPERS: frozenset[str] = frozenset(_HELPERS.split())
"""What scripts import from one module's own path; the installed Accelerate's too."""

NAMES: dict[str, str] = {
    **dict.fromkeys(DELEGATED, _NEEDS),
    "rich": "import rich itself",
    "prepare_pippy": "dispatch_model divides a model over devices",
    **dict.fromkeys(("MegatronEngine", "MegatronLMDummyDataLoader", "MegatronLMDummyScheduler"), _MEGATRON),
    **dict.fromkeys(("MegatronLMOptimizerWrapper", "MegatronLMSchedulerWrapper", "AbstractTrainStep"), _MEGATRON),
    **dict.fromkeys(("BertTrainStep", "GPTTrainStep", "T5TrainStep"), _MEGATRON),
    **dict.fromkeys(("add_model_config_to_megatron_parser", "megatron_lm_initialize"), _MEGATRON),
    **dict.fromkeys(("megatron_lm_prepare_data_loader", "megatron_lm_prepare_model_optimizer_scheduler"), _MEGATRON),
    **dict.fromkeys(("megatron_lm_prepare_optimizer", "megatron_lm_prepare_scheduler"), _MEGATRON),
    **dict.fromkeys(("fsdp2_apply_ac", "fsdp2_load_full_state_dict", "fsdp2_prepare_model"), _FSDP),
    "fsdp2_switch_optimizer_parameters": _FSDP,
}
"""Name -> the way around, for every public name of `accelerate` 1.15 and `accelerate.utils` that is not offered."""

MODULES: dict[str, str] = {
    "commands": "use the `distui` command: launch, config, doctor, checkpoint",
    "hooks": _NEEDS,
    "inference": "dispatch_model divides a model over devices",
    "checkpointing": "accelerator.save_state and load_state",
    "utils.bnb": _NEEDS,
    "utils.ao": _NEEDS,
    "utils.transformer_engine": _NEEDS,
    "utils.offload": _NEEDS,
    "utils.launch": _NEEDS,
    "utils.torch_xla": _NEEDS,
    "utils.rich": "import rich itself",
}
"""Module of accelerate, without that name -> the way around."""


def offered(module: str, table: dict[str, str], name: str) -> Any:
    """Return `name` of accelerate's `module`: from the module that `table` names, or what refuses.

    Raises: AttributeError where Accelerate has no such name either.
    """
    if name in table:
        return getattr(import_module(table[name]), name)
    if name in DELEGATED | HELPERS and find_spec("accelerate") is not None:
        for place in (module, "accelerate", "accelerate.utils"):
            if hasattr(import_module(place), name):
                return getattr(import_module(place), name)
    if name in NAMES or name in HELPERS:
        return refused(name, NAMES.get(name, _NEEDS))
    raise AttributeError(f"distui's {module} has no {name!r}; {PAGE} lists what is offered")


def install_module_refusals() -> None:
    """Make imports of modules that are not offered say so."""
    theirs = {name for name, way in MODULES.items() if way == _NEEDS}
    refuse_modules("distui.compat.accelerate", "accelerate", MODULES, PAGE, theirs)
