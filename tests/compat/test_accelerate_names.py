"""Every public name of Accelerate 1.15 is there: offered, or refused with the way around."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import pytest

from distui.compat import accelerate
from distui.compat.accelerate import Accelerator, NotOffered
from distui.compat.accelerate import utils as accelerate_utils
from distui.compat.accelerate.refusals import DELEGATED, MODULES, NAMES
from distui.core.errors import UserError

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None

TOP = """
Accelerator AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration DeepSpeedPlugin
DistributedDataParallelKwargs DistributedType FullyShardedDataParallelPlugin GradScalerKwargs
InitProcessGroupKwargs ParallelismConfig PartialState ProfileKwargs cpu_offload cpu_offload_with_hook
debug_launcher disk_offload dispatch_model find_executable_batch_size infer_auto_device_map init_empty_weights
init_on_device is_rich_available load_checkpoint_and_dispatch load_checkpoint_in_model notebook_launcher
prepare_pippy rich skip_first_batches synchronize_rng_states
"""
UTILS = """
AORecipeKwargs AbstractTrainStep AutocastKwargs BertTrainStep BnbQuantizationConfig CannotPadNestedTensorWarning
ComputeEnvironment CustomDtype DDPCommunicationHookType DataLoaderConfiguration DeepSpeedEngineWrapper
DeepSpeedOptimizerWrapper DeepSpeedPlugin DeepSpeedSchedulerWrapper DeepSpeedSequenceParallelConfig
DistributedDataParallelKwargs DistributedType DummyOptim DummyScheduler DynamoBackend FP8RecipeKwargs
FullyShardedDataParallelPlugin GPTTrainStep GatheredParameters GradScalerKwargs GradientAccumulationPlugin
HfDeepSpeedConfig InitProcessGroupKwargs KwargsHandler LoggerType MITA_PROFILING_AVAILABLE_PYTORCH_VERSION
MODEL_NAME MSAMPRecipeKwargs MegatronEngine MegatronLMDummyDataLoader MegatronLMDummyScheduler
MegatronLMOptimizerWrapper MegatronLMPlugin MegatronLMSchedulerWrapper OPTIMIZER_NAME OffloadedWeightsLoader
PROFILE_PATTERN_NAME ParallelismConfig PrecisionType PrefixedDataset PrepareForLaunch ProfileKwargs
ProjectConfiguration RNGType RNG_STATE_NAME SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME
SAFE_WEIGHTS_PATTERN_NAME SAMPLER_NAME SCALER_NAME SCHEDULER_NAME SageMakerDistributedType T5TrainStep
TERecipeKwargs TORCH_DISTRIBUTED_OPERATION_TYPES TORCH_LAUNCH_PARAMS TensorInformation TorchContextParallelConfig
TorchDynamoPlugin TorchTensorParallelConfig TorchTensorParallelPlugin WEIGHTS_INDEX_NAME WEIGHTS_NAME
WEIGHTS_PATTERN_NAME XPU_PROFILING_AVAILABLE_PYTORCH_VERSION _filter_args add_model_config_to_megatron_parser
align_module_device apply_fp8_autowrap are_libraries_initialized avg_losses_across_data_parallel_group broadcast
broadcast_object_list calculate_maximum_sizes check_cuda_fp8_capability check_cuda_p2p_ib_support check_device_map
check_os_kernel check_tied_parameters_in_config check_tied_parameters_on_same_device
clean_state_dict_for_safetensors clear_environment compare_versions compile_regions compile_regions_deepspeed
compile_regions_fsdp2 compute_module_sizes concatenate contextual_fp8_autocast convert_bytes
convert_dict_to_env_variables convert_file_size_to_int convert_model convert_model_to_fp8_ao
convert_outputs_to_fp32 convert_to_fp32 copy_tensor_to_devices deepspeed_required
disable_fsdp_ram_efficient_loading dtype_byte_size enable_fsdp_ram_efficient_loading ensure_weights_retied
extract_model_from_parallel extract_submodules_state_dict filter_first_and_last_linear_layers find_batch_size
find_device find_executable_batch_size find_tied_parameters fsdp2_apply_ac fsdp2_canonicalize_names
fsdp2_load_full_state_dict fsdp2_prepare_model fsdp2_switch_optimizer_parameters gather
gather_across_data_parallel_groups gather_object get_active_deepspeed_plugin get_balanced_memory
get_cpu_distributed_information get_current_device_type get_data_structure get_fsdp2_grad_scaler get_gpu_info
get_grad_scaler get_int_from_env get_max_layer_size get_max_memory get_mixed_precision_context_manager
get_model_tp_size get_module_children_bottom_up get_pretty_name has_4bit_bnb_layers has_ao_layers
has_compiled_regions has_offloaded_params has_transformer_engine_layers honor_type id_tensor_storage
ignorant_find_batch_size infer_auto_device_map initialize_tensors install_xla is_4bit_bnb_available
is_8bit_bnb_available is_aim_available is_amdsmi_available is_bf16_available
is_bitsandbytes_multi_backend_available is_bnb_available is_boto3_available is_clearml_available
is_comet_ml_available is_compiled_module is_cuda_available is_datasets_available is_deepspeed_available
is_dvclive_available is_fp16_available is_fp8_available is_habana_gaudi1 is_hpu_available is_import_timer_available
is_lomo_available is_matplotlib_available is_megatron_lm_available is_mlflow_available is_mlu_available
is_mps_available is_msamp_available is_musa_available is_namedtuple is_neuron_available is_npu_available
is_pandas_available is_peft_available is_peft_model is_pippy_available is_port_in_use is_pynvml_available
is_pytest_available is_rich_available is_rocm_available is_sagemaker_available is_schedulefree_available
is_sdaa_available is_swanlab_available is_tensor_information is_tensorboard_available is_timm_available
is_torch_tensor is_torch_version is_torch_xla_available is_torchao_available is_torchdata_available
is_torchdata_stateful_dataloader_available is_torchvision_available is_trackio_available
is_transformer_engine_available is_transformer_engine_mxfp8_available is_transformers_available is_triton_available
is_wandb_available is_weights_only_available is_xccl_available is_xpu_available listify load
load_and_quantize_model load_checkpoint_in_model load_fsdp_model load_fsdp_optimizer load_offloaded_weight
load_offloaded_weights load_state_dict map_pytorch_optim_to_deepspeed megatron_lm_initialize
megatron_lm_prepare_data_loader megatron_lm_prepare_model_optimizer_scheduler megatron_lm_prepare_optimizer
megatron_lm_prepare_scheduler merge_dicts merge_fsdp_weights model_has_dtensor named_module_tensors
offload_state_dict offload_weight pad_across_processes pad_input_tensors parse_choice_from_env parse_flag_from_env
patch_environment prepare_deepspeed_cmd_env prepare_multi_gpu_env prepare_sagemager_args_inputs
prepare_simple_launcher_cmd_env prepare_tpu purge_accelerate_environment recursive_getattr recursively_apply reduce
release_memory retie_parameters save save_fsdp_model save_fsdp_optimizer save_offload_index send_to_device
set_module_tensor_to_device set_numa_affinity set_seed slice_tensors str_to_bool synchronize_rng_state
synchronize_rng_states torchao_required tqdm wait_for_everyone write_basic_config
"""
MEMBERS = """
accumulate autocast backward check_trigger clear clip_grad_norm_ clip_grad_value_ context_parallel_rank
data_parallel_rank data_parallel_shard_rank deepspeed_plugin deepspeed_ulysses_dl_adapter device dispatch_batches
distributed_type end_training even_batches fp8_backend free_memory gather gather_for_metrics get_state_dict
get_tracker gradient_accumulation_steps init_trackers is_composable_parallelism_enabled is_fsdp2 is_last_process
is_local_main_process is_main_process join_uneven_inputs load_state local_main_process_first local_process_index
log logging_dir lomo_backward main_process_first maybe_context_parallel mixed_precision multi_device no_sync
non_blocking num_processes on_last_process on_local_main_process on_local_process on_main_process on_process
optimizer_step_was_skipped pad_across_processes parallelism_config pipeline_parallel_rank prepare
prepare_data_loader prepare_model prepare_optimizer prepare_scheduler print process_index profile project_dir
reduce register_for_checkpointing register_load_state_pre_hook register_save_state_pre_hook save save_iteration
save_model save_state set_trigger should_save_model skip_first_batches split_batches split_between_processes
sync_gradients tensor_parallel_rank torch_device_mesh trigger_sync_in_backward unscale_gradients unwrap_model
use_distributed use_seedable_sampler use_stateful_dataloader verify_device_map wait_for_everyone
"""
"""Of the class Accelerator."""
ELSEWHERE = {
    "accelerator": "Accelerator DataLoaderConfiguration GradientAccumulationPlugin",
    "big_modeling": "init_empty_weights init_on_device",
    "data_loader": "BatchSamplerShard DataLoaderDispatcher DataLoaderShard IterableDatasetShard SeedableRandomSampler "
    "SkipBatchSampler SkipDataLoader get_sampler prepare_data_loader skip_first_batches",
    "launchers": "debug_launcher notebook_launcher",
    "local_sgd": "LocalSGD",
    "logging": "MultiProcessAdapter get_logger",
    "memory_utils": "find_executable_batch_size",
    "optimizer": "AcceleratedOptimizer",
    "scheduler": "AcceleratedScheduler",
    "state": "AcceleratorState GradientState PartialState is_initialized",
    "test_utils": "RegressionDataset RegressionModel are_the_same_tensors assert_exception torch_device",
    "tracking": "GeneralTracker TensorBoardTracker WandBTracker filter_trackers on_main_process",
    "utils.dataclasses": "DeepSpeedPlugin DistributedType FullyShardedDataParallelPlugin ProjectConfiguration",
    "utils.deepspeed": "DummyOptim DummyScheduler",
    "utils.memory": "find_executable_batch_size release_memory",
    "utils.operations": "DistributedOperationException gather reduce",
    "utils.random": "set_seed synchronize_rng_states",
}


@pytest.mark.parametrize(("module", "names"), [(accelerate, TOP), (accelerate_utils, UTILS)], ids=["top", "utils"])
def test_every_public_name_is_offered_or_refused(module: object, names: str) -> None:
    wrong = []
    for name in names.split():
        value = getattr(module, name)
        if name in DELEGATED and HAS_ACCELERATE:
            assert getattr(importlib.import_module(value.__module__), name) is value
        elif name in NAMES:
            with pytest.raises(NotOffered, match=f"{name} is not offered by distui"):
                value()
        elif not callable(value) and not isinstance(value, (str, list)):
            wrong.append(name)
    assert not wrong


def test_a_name_is_offered_or_refused_but_not_both() -> None:
    both = {name for name in NAMES if name in accelerate.__all__ or name in accelerate_utils.__all__}
    assert not both


@pytest.mark.parametrize("module", ELSEWHERE)
def test_the_modules_that_scripts_import_from(module: str) -> None:
    loaded = importlib.import_module(f"distui.compat.accelerate.{module}")
    assert [name for name in ELSEWHERE[module].split() if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", [name for name, way in MODULES.items() if not way.startswith("pip install")])
def test_a_module_that_is_not_there_can_be_imported_and_names_the_way_around(module: str) -> None:
    loaded = importlib.import_module(f"distui.compat.accelerate.{module}.any_part")
    with pytest.raises(NotOffered, match=f"accelerate's {module}.any_part.name is not offered") as caught:
        loaded.name()
    assert caught.value.fix == MODULES[module]
    with pytest.raises(ModuleNotFoundError, match=r"does not offer accelerate\.mistyped"):
        importlib.import_module("distui.compat.accelerate.mistyped")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="reads Accelerate's folder")
def test_every_module_of_accelerate_can_be_imported_by_its_own_path() -> None:
    spec = importlib.util.find_spec("accelerate")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.glob("*.py")) + sorted((root / "utils").glob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix("__init__").strip(".")
        importlib.import_module(f"distui.compat.accelerate.{name}".strip("."))


def test_the_accelerator_has_every_member() -> None:
    missing = {name for name in MEMBERS.split() if not hasattr(Accelerator, name)}
    assert missing == {"lomo_backward"}


def test_the_accelerator_takes_every_argument() -> None:
    expected = (
        "device_placement split_batches mixed_precision gradient_accumulation_steps cpu dataloader_config "
        "deepspeed_plugin fsdp_plugin torch_tp_plugin megatron_lm_plugin rng_types log_with project_dir project_config "
        "gradient_accumulation_plugin step_scheduler_with_optimizer kwargs_handlers dynamo_backend dynamo_plugin "
        "deepspeed_plugins parallelism_config"
    )
    assert list(inspect.signature(Accelerator.__init__).parameters)[1:] == expected.split()


def test_a_refused_name_can_be_asked_about_but_not_used() -> None:
    from distui.compat.accelerate.utils import GPTTrainStep

    assert not isinstance(object(), GPTTrainStep)
    with pytest.raises(NotOffered, match="GPTTrainStep is not offered") as caught:
        GPTTrainStep()
    assert "MegatronLMPlugin" in caught.value.fix
    with pytest.raises(NotOffered):
        GPTTrainStep.something  # noqa: B018


def test_every_field_of_megatrons_plugin_is_obeyed_or_refused() -> None:
    from distui.compat.accelerate.utils import MegatronLMPlugin

    plugin = MegatronLMPlugin(
        tp_degree=1,
        use_distributed_optimizer=True,
        recompute_activations=True,
        optimizer_cpu_offload=True,
        gradient_clipping=0.5,
    )
    config = Accelerator(megatron_lm_plugin=plugin).engine.config
    found = (config.strategy.zero_stage, config.offload.optimizer, config.activation_checkpointing.mode)
    assert found == (1, "cpu", "selective") and config.optimizer.max_grad_norm == 0.5
    assert Accelerator(megatron_lm_plugin=MegatronLMPlugin(use_custom_fsdp=True)).engine.config.strategy.zero_stage == 3
    obeyed = set(inspect.signature(MegatronLMPlugin).parameters)
    axes = MegatronLMPlugin(tp_degree=2, pp_degree=3, num_micro_batches=6).sections()["strategy"]
    assert axes == {"tensor_parallel": 2, "pipeline_parallel": 3}
    with pytest.raises(NotOffered, match=r"num_micro_batches=4\) with pp_degree=1"):
        MegatronLMPlugin(num_micro_batches=4)
    for name, value in {"sequence_parallelism": True, "custom_loss_function": len, "seq_length": 8}.items():
        with pytest.raises(NotOffered, match=f"MegatronLMPlugin\\({name}="):
            MegatronLMPlugin(**{name: value})
    with pytest.raises(TypeError, match="no field 'mistyped'"):
        MegatronLMPlugin(mistyped=1)
    if HAS_ACCELERATE:
        theirs = importlib.import_module("accelerate.utils").MegatronLMPlugin
        for name in set(inspect.signature(theirs).parameters) - obeyed:
            with pytest.raises(NotOffered):
                MegatronLMPlugin(**{name: 99})


def test_recipes_describe_and_are_refused_where_they_are_used() -> None:
    from distui.compat.accelerate import utils

    assert utils.TERecipeKwargs(fp8_format="e4m3").fp8_format == "E4M3"
    with pytest.raises(ValueError, match="opt_level"):
        utils.MSAMPRecipeKwargs(opt_level="O9")
    for recipe in (utils.AORecipeKwargs, utils.TERecipeKwargs, utils.MSAMPRecipeKwargs, utils.FP8RecipeKwargs):
        with pytest.raises(NotOffered, match="no fp8 matrix multiplications"):
            Accelerator(kwargs_handlers=[recipe()])
    assert Accelerator(torch_tp_plugin=utils.TorchTensorParallelPlugin()).num_processes == 1


def test_sizes_of_axes_are_checked_where_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.compat.accelerate import ParallelismConfig, utils

    handler = utils.TorchContextParallelConfig("alltoall")
    axes = ParallelismConfig(dp_shard_size=2, tp_size=3, cp_size=2, cp_handler=handler)
    assert (axes.total_size, axes.data_parallel_size, axes.non_data_parallel_size) == (12, 2, 6)
    assert (axes.active_mesh_dims, axes.dp_shard_cp_dim_names) == (["dp_shard", "tp", "cp"], ["dp_shard", "cp"])
    assert axes.cp_enabled and not axes.sp_enabled and axes.cp_handler is handler
    assert axes.sections() == {"strategy": {"zero_stage": 3, "tensor_parallel": 3, "context_parallel": 2}}
    for wrong, words in {
        "cp_size and sp_size": "mutually exclusive",
        "tp_size below 1": "tp_size must be at least 1",
        "handler": "cp_handler must be a TorchContextParallelConfig",
        "backend": "`cp_backend` must be one of torch",
    }.items():
        given: dict[str, dict[str, Any]] = {
            "cp_size and sp_size": {"cp_size": 2, "sp_size": 2},
            "tp_size below 1": {"tp_size": 0},
            "handler": {"cp_size": 2, "cp_handler": utils.TorchTensorParallelConfig()},
            "backend": {"cp_backend": "other"},
        }
        with pytest.raises(ValueError, match=words):
            ParallelismConfig(**given[wrong])
    with pytest.raises(NotOffered, match="enable_async_tp"):
        utils.TorchTensorParallelConfig(enable_async_tp=True)
    with pytest.raises(ValueError, match="sp_seq_length"):
        utils.DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=False)
    groups = ParallelismConfig(dp_shard_size=2, dp_replicate_size=2)
    groups.check(4)
    assert groups.sections() == {"strategy": {"zero_stage": 3, "shard_size": 2}}
    with pytest.raises(UserError, match=r"total_size \(2\) does not match num_processes \(1\)"):
        Accelerator(parallelism_config=ParallelismConfig(cp_size=2, cp_handler=handler))
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    assert ParallelismConfig().tp_size == 2
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="tp_size=2"):
        Accelerator()


def test_scalers_and_contexts_of_a_loop_of_its_own() -> None:
    import torch

    from distui.compat.accelerate import utils
    from distui.compat.accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    Accelerator(mixed_precision="bf16")
    with utils.get_mixed_precision_context_manager(native_amp=True, autocast_kwargs=utils.AutocastKwargs()):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with utils.get_mixed_precision_context_manager():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    assert utils.get_grad_scaler(enabled=False).get_scale() == 1.0
    assert utils.avg_losses_across_data_parallel_group([torch.tensor(1.0), torch.tensor(3.0)]).tolist() == [1.0, 3.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert utils.map_pytorch_optim_to_deepspeed(optimizer) is optimizer
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(not HAS_ACCELERATE, reason="needs Accelerate installed")
def test_what_needs_no_engine_is_the_installed_librarys_own() -> None:
    import torch

    from distui.compat.accelerate import dispatch_model, infer_auto_device_map

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    device_map = infer_auto_device_map(model, max_memory={"cpu": 10**9})
    assert set(device_map.values()) == {"cpu"}
    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    importlib.import_module("distui.compat.accelerate.hooks").remove_hook_from_submodules(model)


def test_a_name_that_is_a_module_too_can_be_called_whoever_imports_first() -> None:
    """`import accelerate.utils.tqdm` puts the module where the function is looked for."""
    module: Any = importlib.import_module("distui.compat.accelerate.utils.tqdm")
    assert list(module(range(3), disable=True)) == list(module.tqdm(range(3), disable=True)) == [0, 1, 2]


def test_trackers_that_only_accelerate_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = importlib.import_module("distui.compat.accelerate.tracking")
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict(tracking.LOGGER_TYPE_TO_CLASS))
    monkeypatch.setattr(tracking, "_LIBRARY", dict(tracking._LIBRARY))
    if importlib.util.find_spec("accelerate") is not None:
        theirs = importlib.import_module("accelerate.tracking").AimTracker
        monkeypatch.setattr(tracking, "_is_there", lambda name: True)
        assert tracking.filter_trackers("aim", "logs") == ["aim"]
        assert tracking.LOGGER_TYPE_TO_CLASS["aim"] is theirs is tracking.AimTracker
        del tracking.LOGGER_TYPE_TO_CLASS["aim"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotOffered, match="pip install accelerate"):
        tracking.filter_trackers("aim", "logs")


def test_environments_are_purged_and_written_as_accelerate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    @accelerate_utils.purge_accelerate_environment
    class Base:
        def test_one(self) -> None:
            os.environ["ACCELERATE_OF_A_TEST"] = "1"

    class Derived(Base):
        def test_two(self) -> None:
            os.environ["ACCELERATE_OF_A_TEST"] = "2"

    monkeypatch.delenv("ACCELERATE_OF_A_TEST", raising=False)
    for test in (Base().test_one, Derived().test_one, Derived().test_two):
        test()
        assert "ACCELERATE_OF_A_TEST" not in os.environ
    lines = accelerate_utils.convert_dict_to_env_variables({"GOOD": "1", "BAD": "a;b", "": "x", "EMPTY": ""})
    assert lines == ["GOOD=1\n"]
