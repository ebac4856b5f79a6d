"""DeepSpeed's and Accelerate's configurations, in and out.

The cases hold the keys and values of the examples that both projects publish: Accelerate's `config_yaml_templates`,
`deepspeed_config_templates`, `test_configs`, `torch_native_parallelism`; DeepSpeedExamples' `model_configs`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import yaml

from distui.core.config.imports.carried import Carried
from distui.core.config.imports.files import import_file
from distui.core.config.schema import Config
from distui.core.errors import ConfigError, UserError
from distui.core.hardware.detect import parse_hardware
from distui.tui.setup.changes import take_import
from distui.tui.setup.model import WizardState

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
AUTO_BATCH = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}
ON_CPU = {"device": "cpu", "pin_memory": True}
WARMUP = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "total_num_steps": "auto"}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
FSDP1 = {
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False,
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": True,
}
WRITTEN_BY_WIZARD = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 8,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}


def _file(folder: Path, data: Any, name: str = "theirs.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data) if name.endswith("json") else yaml.safe_dump(data))
    return path


def _kinds(carried: Carried) -> dict[str, str]:
    return {note.key: note.kind for note in carried.notes}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {
                "fp16": FP16,
                "optimizer": ADAMW,
                "scheduler": WARMUP,
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": ON_CPU,
                    "offload_param": ON_CPU,
                    "overlap_comm": True,
                    "contiguous_gradients": True,
                    "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": "auto",
                    "sub_group_size": 1e9,
                    "stage3_max_live_parameters": 1e9,
                    "stage3_max_reuse_distance": 1e9,
                    "stage3_gather_16bit_weights_on_model_save": "auto",
                },
                "gradient_clipping": "auto",
                "steps_per_print": 2000,
                "wall_clock_breakdown": False,
                **AUTO_BATCH,
            },
            {
                "strategy.zero_stage": 3,
                "offload.optimizer": "cpu",
                "offload.params": "cpu",
                "precision.dtype": "fp16",
                "precision.initial_loss_scale": 65536.0,
                "precision.loss_scale_window": 1000,
                "batch.accumulation": 1,
                "optimizer.name": "adamw",
            },
        ),
        (
            {
                "train_batch_size": 128,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 1.0,
                "steps_per_print": 100,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 500000000, "reduce_scatter": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1.2e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
            },
            {
                "strategy.zero_stage": 2,
                "precision.dtype": "bf16",
                "batch.global_size": 128,
                "batch.micro_size": 4,
                "batch.accumulation": 4,
                "optimizer.max_grad_norm": 1.0,
                "optimizer.name": "adamw",
            },
        ),
        (
            {
                "train_batch_size": 1,
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5},
                },
                "aio": {"block_size": 8388608, "queue_depth": 32},
            },
            {
                "batch.global_size": 1,
                "strategy.zero_stage": 3,
                "offload.params": "nvme",
                "offload.nvme_path": "/local_nvme",
            },
        ),
    ],
)
def test_published_deepspeed_files(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    carried = import_file(_file(tmp_path, theirs))
    assert carried.values == ours
    assert carried.source == "DeepSpeed"
    assert not [note for note in carried.notes if note.kind == "unknown"]
    _the_wizard_takes(carried, tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 2, "fsdp_config": FSDP1},
            {"strategy.zero_stage": 3, "precision.dtype": "bf16", "cluster.nproc": 2},
        ),
        (
            {
                "distributed_type": "MULTI_GPU",
                "machine_rank": 0,
                "main_process_ip": "10.0.0.1",
                "main_process_port": 9999,
                "num_machines": 2,
                "num_processes": 8,
                "rdzv_backend": "static",
                "same_network": False,
            },
            {
                "cluster.nodes": 2,
                "cluster.node_rank": 0,
                "cluster.master_addr": "10.0.0.1",
                "cluster.master_port": 9999,
                "cluster.nproc": 4,
            },
        ),
        (
            {
                **WRITTEN_BY_WIZARD,
                "distributed_type": "FSDP",
                "mixed_precision": "bf16",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_reshard_after_forward": False,
                    "fsdp_activation_checkpointing": True,
                    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
                },
                "parallelism_config": {
                    "parallelism_config_cp_size": 4,
                    "parallelism_config_dp_replicate_size": 1,
                    "parallelism_config_dp_shard_size": 2,
                    "parallelism_config_tp_size": 1,
                },
            },
            {
                "strategy.zero_stage": 2,
                "strategy.context_parallel": 4,
                "precision.dtype": "bf16",
                "activation_checkpointing.mode": "full",
                "cluster.nproc": 8,
            },
        ),
        (
            {
                **WRITTEN_BY_WIZARD,
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "gradient_accumulation_steps": 4,
                    "gradient_clipping": 1.0,
                    "offload_optimizer_device": "cpu",
                    "offload_param_device": "none",
                    "zero3_init_flag": False,
                    "zero_stage": 2,
                },
            },
            {
                "strategy.zero_stage": 2,
                "offload.optimizer": "cpu",
                "batch.accumulation": 4,
                "optimizer.max_grad_norm": 1.0,
                "cluster.nproc": 8,
            },
        ),
        (
            {
                "distributed_type": "NO",
                "mixed_precision": "fp8",
                "fp8_config": {"backend": "TE", "amax_history_len": 1024, "override_linear_precision": [False] * 3},
            },
            {"precision.dtype": "bf16", "cluster.nproc": 1},
        ),
        (
            {
                "compute_environment": "LOCAL_MACHINE",
                "debug": True,
                "use_cpu": True,
                "num_processes": 1,
                "distributed_type": "NO",
                "fsdp_config": {"fsdp_sync_module_states": False},
                "deepspeed_config": {"deepspeed_config_file": "path/to/be/ignored"},
            },
            {"cluster.nproc": 1, "run.device": "cpu"},
        ),
    ],
)
def test_published_accelerate_files(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    carried = import_file(_file(tmp_path, theirs, "theirs.yaml"))
    assert carried.values == ours
    assert not [note for note in carried.notes if note.kind == "unknown"]
    _the_wizard_takes(carried, tmp_path)


def _the_wizard_takes(carried: Carried, folder: Path) -> None:
    """Resume a file with comments, as `distui setup --from` does, and read what it would write."""
    path = folder / "distui.toml"
    path.write_text("# ours\n[monitor]\ntheme = 'nord'  # dark\n")
    state = WizardState.open(path)
    take_import(state, carried, "theirs")
    state.set_hardware(replace(parse_hardware("8xA100-80GB"), source="detected"))  # a name would bring its own nodes
    choices = state.choices()
    kept = state.kept()
    assert kept is not None and any(choice.is_like(kept) for choice in choices)
    state.choose(kept)
    text = state.toml()
    assert "# ours" in text and "# dark" in text
    written = Config.model_validate(tomlkit.parse(text).unwrap())
    for key, value in carried.values.items():
        section, _, name = key.partition(".")
        found = getattr(getattr(written, section), name)
        assert found == value or (key == "batch.accumulation" and found is None), key


def test_accelerate_file_that_names_a_deepspeed_file(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    _file(tmp_path / "templates", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "zero1.json")
    data = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 2,
        "deepspeed_config": {"deepspeed_config_file": "templates/zero1.json", "zero3_init_flag": False},
    }
    carried = import_file(_file(tmp_path, data, "theirs.yaml"))
    assert carried.values == {"strategy.zero_stage": 1, "precision.dtype": "bf16", "cluster.nproc": 2}


def test_keys_that_its_own_tool_would_ignore_are_named_with_the_nearest(tmp_path: Path) -> None:
    carried = import_file(
        _file(tmp_path, {"train_batch_size": 8, "gradient_cliping": 1.0, "zero_optimization": {"stge": 3}})
    )
    told = {note.key: note.why for note in carried.notes if note.kind == "unknown"}
    assert "did you mean gradient_clipping?" in told["gradient_cliping"]
    assert "did you mean stage?" in told["zero_optimization.stge"]
    section = {"fsdp_verison": 2}
    carried = import_file(_file(tmp_path, {"distributed_type": "FSDP", "fsdp_config": section}, "a.yaml"))
    assert "did you mean fsdp_version?" in next(note.why for note in carried.notes if note.kind == "unknown")


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "train_batch_size": 8,
        "fp16": {"enabled": True, "loss_scale": 128},
        "hybrid_engine": {"enabled": True},
    }
    data["elasticity"] = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [2]}
    kinds = _kinds(import_file(_file(tmp_path, data)))
    assert kinds["fp16.loss_scale"] == "lost"
    assert kinds["hybrid_engine.enabled"] == "lost"
    assert kinds["elasticity.micro_batch_sizes"] == "script"  # of the face, which works out the batch
    assert kinds["gradient_clipping"] == "changed"  # absent, and then DeepSpeed clips at 1.0


def test_offload_that_deepspeed_ignores_is_not_taken_over(tmp_path: Path) -> None:
    data = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    carried = import_file(_file(tmp_path, data))
    assert "offload.params" not in carried.values
    assert _kinds(carried)["zero_optimization.offload_param.device"] == "lost"


def test_comments_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "annotated.json"
    path.write_text('{\n // ZeRO\n "zero_optimization": {"stage": 1}, /* all */\n}')
    assert import_file(path).values == {"strategy.zero_stage": 1}


def test_every_wrong_value_is_told_at_once(tmp_path: Path) -> None:
    data = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 5},
        "fp16": {"enabled": "maybe"},
    }
    with pytest.raises(ConfigError) as error:
        import_file(_file(tmp_path, data))
    assert {problem.path for problem in error.value.problems} == {
        "train_batch_size",
        "fp16.enabled",
        "strategy.zero_stage",
    }


def test_two_formats_at_once_are_refused(tmp_path: Path) -> None:
    data = {"train_batch_size": 8, "fp16": {"enabled": True}, "bf16": {"enabled": True}}
    with pytest.raises(ConfigError, match=r"precision\.dtype"):
        import_file(_file(tmp_path, data))


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.json", "{not json", "is not valid JSON"),
        ("a.yaml", "a: [1", "is not valid YAML"),
        ("a.yaml", "", "holds no settings"),
        ("a.json", "[1, 2]", "holds no settings"),
        ("a.json", '{"colour": "red"}', "is neither a DeepSpeed nor an Accelerate configuration"),
        ("a.yaml", "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: NO\n", "this configuration is for AMAZON"),
        ("a.yaml", "distributed_type: XLA\n", "this configuration is for XLA"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, name: str, text: str, what: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=what):
        import_file(path)
    with pytest.raises(UserError, match="cannot read"):
        import_file(tmp_path / "absent.json")
