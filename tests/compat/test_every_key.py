"""Every key of a peer's configuration is obeyed, needless for a reason that is told, or refused: none is ignored."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from distui.compat.deepspeed.configuration import settle
from distui.compat.deepspeed_json import HANDLED
from distui.compat.not_offered import NotOffered
from distui.core.config.imports import accelerate as accelerate_reader
from distui.core.config.imports import deepspeed as reader
from distui.core.errors import ConfigError, UserError

MICRO = "train_micro_batch_size_per_gpu"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="reads DeepSpeed's schema")
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="reads Accelerate's")


def _nested(key: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {MICRO: 2}
    at = found
    *sections, last = key.split(".")
    for section in sections:
        at = at.setdefault(section, {})
    at[last] = value
    return found


def _other(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return type(value)(value // 2 if value > 2 else value + 1)
    return "other"


def _fate(key: str, value: Any) -> str:
    config = _nested(key, value)
    try:
        settle(config, 1)
    except (NotOffered, ConfigError, ValueError):
        return "refused"
    notes = {note.key: note for note in reader.read(config).notes}
    if any(key == name or key.startswith(f"{name}.") for name in HANDLED):
        return "handled"
    if key not in notes:
        return "carried" if key in reader.known_keys() else "ignored"
    return "needless" if notes[key].kind in ("needless", "changed") and notes[key].why else notes[key].kind


@needs_deepspeed
def test_every_key_of_deepspeeds_json() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        theirs, constants, precision, zero, offload = (
            importlib.import_module(f"deepspeed.runtime.{name}")
            for name in ("config", "constants", "precision_config", "zero.config", "zero.offload_config")
        )
    names = re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z_0-9]+)", inspect.getsource(theirs))
    keys = {
        getattr(theirs, name, getattr(constants, name, None)): getattr(constants, f"{name}_DEFAULT", None)
        for name in names
    }
    sections = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
    }
    for section, model in sections.items():
        for name, field in model.model_fields.items():
            if f"{section}.{field.alias or name}" not in sections:
                keys[f"{section}.{field.alias or name}"] = field.default
    assert len(keys) > 60
    fates = {key: _fate(key, _other(default)) for key, default in keys.items() if isinstance(key, str)}
    ignored = {key: fate for key, fate in fates.items() if fate not in ("carried", "handled", "needless", "refused")}
    assert not ignored
    # What changes the numbers, and is no part of the schema's classes.
    for key, value in {
        "zero_optimization.zero_hpz_partition_size": 8,
        "bf16.bf16_master_weights_and_grads": True,
        "data_types.grad_accum_dtype": "fp16",
        "gradient_allreduce_op": "max",
        "compression_training.weight_quantization.shared_parameters.enabled": True,
        "data_efficiency.data_sampling.curriculum_learning.enabled": True,
        "curriculum_learning.max_dificulty": 8,
        "compile.deepcompile": True,
        "pipeline.stages": 2,
        "tensor_parallel.tp_overlap_comm": True,
        "checkpoint.load_universal": True,
        "sequence_parallel_size": 3,
        "train_batchsize": 8,
    }.items():
        assert _fate(key, value) == "refused", key
    settle(_nested("elasticity", {"enabled": False, "max_train_batch_size": 8}), 1)  # as DeepSpeed: not read


@needs_accelerate
def test_every_field_of_accelerates_plugins() -> None:
    from distui.compat.accelerate.utils import dataclasses as handlers
    from distui.compat.accelerate.utils import plugins

    theirs = importlib.import_module("accelerate.utils.dataclasses")
    for name in (
        "DeepSpeedPlugin",
        "FullyShardedDataParallelPlugin",
        "GradientAccumulationPlugin",
        "DataLoaderConfiguration",
        "ProjectConfiguration",
        "DistributedDataParallelKwargs",
        "GradScalerKwargs",
        "AutocastKwargs",
        "InitProcessGroupKwargs",
        "TorchDynamoPlugin",
        "ProfileKwargs",
    ):
        ours = getattr(plugins, name, None) or getattr(handlers, name)
        fields = {field.name for field in dataclasses.fields(getattr(theirs, name)) if field.init}
        assert fields <= {field.name for field in dataclasses.fields(ours)}, name
    with pytest.raises(NotOffered, match="enable_msamp"):
        plugins.DeepSpeedPlugin(enable_msamp=True)
    for key, value in {
        "gradient_allreduce_op": "sum",
        "managed_gradient_accumulation": False,
        "fp16.loss_scale": 128,
        "tensorboard.enabled": True,
        "torch_autocast.enabled": True,
        "curriculum_learning.enabled": True,
        "data_efficiency.data_routing.random_ltd.enabled": True,
        "elasticity.enabled": True,
        "gradient_cliping": 1.0,
    }.items():
        with pytest.raises((NotOffered, ConfigError)):
            plugins.DeepSpeedPlugin(hf_ds_config=_nested(key, value))
    plugin = plugins.DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "reduce_bucket_size": "auto"},
            "bf16": {"enabled": True},
            "tensorboard": {"enabled": False, "job_name": "run"},
            "train_batch_size": "auto",
            MICRO: "auto",
            "gradient_clipping": 0.5,
        }
    )
    assert plugin.sections() == {
        "strategy": {"zero_stage": 3},
        "compression": {"weights": "int8"},
        "precision": {"dtype": "bf16"},
        "optimizer": {"max_grad_norm": 0.5},
    }
    with pytest.raises(NotOffered):
        plugins.FullyShardedDataParallelPlugin(ignored_modules=["head"])


def _told(config: dict[str, Any], key: str, folder: Path) -> str:
    """Return what becomes of `key` in an Accelerate file."""
    try:
        carried = accelerate_reader.read(config, folder)
    except (ConfigError, UserError):
        return "refused"
    notes = [note for note in carried.notes if note.key == key or note.key.startswith(f"{key}.")]
    if notes:
        assert all(note.why for note in notes), key
        return notes[0].kind
    without = {name: value for name, value in config.items() if name != key}
    section, _, name = key.partition(".")
    if name:
        without[section] = {other: value for other, value in config[section].items() if other != name}
    before = accelerate_reader.read(without, folder)
    return "obeyed" if before.values != carried.values or before.notes != carried.notes else "ignored"


@needs_accelerate
def test_every_key_of_accelerates_file(tmp_path: Path) -> None:
    arguments = importlib.import_module("accelerate.commands.config.config_args")
    parser = importlib.import_module("accelerate.commands.launch").launch_command_parser()
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    given = {
        "compute_environment": "AMAZON_SAGEMAKER",
        "distributed_type": "DEEPSPEED",
        "num_processes": 6,
        "main_process_ip": "10.0.0.1",
        "main_process_port": 5555,
        "gpu_ids": "0,1",
        "commands": ["ls"],
        "tpu_vm": ["a"],
        "tpu_env": ["a=b"],
        "mixed_precision": "bf16",
    }
    sections = [field.name for field in dataclasses.fields(arguments.ClusterConfig) if field.name.endswith("_config")]
    fates: dict[str, str] = {}
    config: dict[str, Any]
    for field in dataclasses.fields(arguments.ClusterConfig):
        if field.name in sections:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        config = {"distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 1}
        config[field.name] = given.get(field.name, _other(default))
        fates[field.name] = _told(config, field.name, tmp_path)
    of_section = {
        "fsdp_config": ("fsdp_", "FSDP"),
        "megatron_lm_config": ("megatron_lm_", "MEGATRON_LM"),
        "parallelism_config": ("parallelism_config_", "FSDP"),
        "fp8_config": ("fp8_", "MULTI_GPU"),
        "dynamo_config": ("dynamo_", "MULTI_GPU"),
        "mpirun_config": ("mpirun_", "MULTI_CPU"),
        "deepspeed_config": (("deepspeed_", "zero", "offload_", "gradient_"), "DEEPSPEED"),
    }
    assert set(of_section) == set(sections)
    words = {
        "fsdp_sharding_strategy": "SHARD_GRAD_OP",
        "fsdp_reshard_after_forward": False,
        "megatron_lm_recompute_granularity": "full",
        "deepspeed_config_file": "ds.json",
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "offload_optimizer_nvme_path": "/nvme",
        "offload_param_nvme_path": "/nvme",
        "zero_stage": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }
    for action in parser._actions:
        for section, (prefix, kind) in of_section.items():
            if not action.dest.startswith(prefix):
                continue
            value = words.get(action.dest, 2 if action.type is int else True)
            config = {"distributed_type": kind, "num_processes": 8, section: {action.dest: value}}
            if section == "deepspeed_config" and action.dest.startswith("offload"):
                home = "_".join(action.dest.split("_")[:2]) + "_device"
                config[section] |= {"zero_stage": 3, home: "cpu" if action.dest == home else "nvme"}
            fates[f"{section}.{action.dest}"] = _told(config, f"{section}.{action.dest}", tmp_path)
    assert len(fates) > 80
    wrong = {key: fate for key, fate in fates.items() if fate in ("ignored", "unknown")}
    assert not wrong
    for section, key in (("fsdp_config", "fsdp_shard"), ("megatron_lm_config", "megatron_lm_tp")):
        config = {"distributed_type": of_section[section][1], section: {key: 1}}
        assert _told(config, f"{section}.{key}", tmp_path) == "unknown"
