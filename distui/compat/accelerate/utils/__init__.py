"""Everything that scripts import from `accelerate.utils`; names load on first use."""

from __future__ import annotations

from typing import Any

from distui.compat.accelerate.refusals import NAMES as REFUSED
from distui.compat.accelerate.refusals import offered

_BASE = "distui.compat.accelerate.utils"
_IN: dict[str, str] = {
    "constants": "MITA_PROFILING_AVAILABLE_PYTORCH_VERSION MODEL_NAME OPTIMIZER_NAME PROFILE_PATTERN_NAME "
    "RNG_STATE_NAME SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME SAFE_WEIGHTS_PATTERN_NAME SAMPLER_NAME "
    "SCALER_NAME SCHEDULER_NAME TORCH_DISTRIBUTED_OPERATION_TYPES TORCH_LAUNCH_PARAMS WEIGHTS_INDEX_NAME WEIGHTS_NAME "
    "WEIGHTS_PATTERN_NAME XPU_PROFILING_AVAILABLE_PYTORCH_VERSION",
    "dataclasses": "AutocastKwargs BaseEnum ComputeEnvironment CustomDtype DataLoaderConfiguration "
    "DDPCommunicationHookType DeepSpeedPlugin DistributedDataParallelKwargs DistributedType DynamoBackend "
    "FullyShardedDataParallelPlugin GradientAccumulationPlugin GradScalerKwargs InitProcessGroupKwargs KwargsHandler "
    "LoggerType PrecisionType ProfileKwargs ProjectConfiguration RNGType TensorInformation "
    "TorchDynamoPlugin",
    "environment": "are_libraries_initialized clear_environment convert_dict_to_env_variables get_current_device_type "
    "get_int_from_env parse_choice_from_env parse_flag_from_env patch_environment purge_accelerate_environment "
    "str_to_bool",
    "megatron_lm": "MegatronLMPlugin avg_losses_across_data_parallel_group gather_across_data_parallel_groups",
    "axes": "DeepSpeedSequenceParallelConfig ParallelismConfig TorchContextParallelConfig TorchTensorParallelConfig "
    "TorchTensorParallelPlugin",
    "recipes": "AORecipeKwargs FP8RecipeKwargs MSAMPRecipeKwargs TERecipeKwargs",
    "memory": "clear_device_cache find_executable_batch_size release_memory",
    "modeling": "compute_module_sizes convert_file_size_to_int dtype_byte_size find_tied_parameters get_grad_scaler "
    "get_mixed_precision_context_manager id_tensor_storage "
    "is_peft_model load_checkpoint_in_model load_state_dict named_module_tensors retie_parameters "
    "set_module_tensor_to_device",
    "operations": "CannotPadNestedTensorWarning DistributedOperationException broadcast broadcast_object_list "
    "concatenate convert_outputs_to_fp32 convert_to_fp32 copy_tensor_to_devices find_batch_size find_device gather "
    "gather_object get_data_structure honor_type ignorant_find_batch_size initialize_tensors is_namedtuple "
    "is_tensor_information is_torch_tensor listify pad_across_processes pad_input_tensors recursively_apply reduce "
    "send_to_device slice_tensors",
    "other": "check_os_kernel clean_state_dict_for_safetensors compile_regions convert_bytes "
    "compile_regions_deepspeed compile_regions_fsdp2 "
    "extract_model_from_parallel get_model_tp_size get_module_children_bottom_up get_pretty_name has_compiled_regions "
    "is_compiled_module is_port_in_use load merge_dicts model_has_dtensor recursive_getattr save wait_for_everyone "
    "write_basic_config",
    "deepspeed": "DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedSchedulerWrapper DummyOptim DummyScheduler "
    "GatheredParameters HfDeepSpeedConfig get_active_deepspeed_plugin map_pytorch_optim_to_deepspeed",
    "fsdp_utils": "disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading ensure_weights_retied "
    "load_fsdp_model load_fsdp_optimizer merge_fsdp_weights save_fsdp_model save_fsdp_optimizer",
    "random": "set_seed synchronize_rng_state synchronize_rng_states",
    "tqdm": "tqdm",
    "versions": "compare_versions is_torch_version",
}
_LAZY = {name: f"{_BASE}.{module}" for module, names in _IN.items() for name in names.split()}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY or name in REFUSED:
        value = offered("accelerate.utils", _LAZY, name)
    elif name.startswith("is_"):
        value = getattr(import_module(f"{_BASE}.imports"), name)
    else:
        return offered("accelerate.utils", _LAZY, name)
    globals()[name] = value
    return value
