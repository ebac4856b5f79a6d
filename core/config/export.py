"""Writes settings as a DeepSpeed JSON or an Accelerate YAML, and says what neither can hold.

What is written comes back by `distui.core.config.imports` as it was.
"""

from __future__ import annotations

import math
from typing import Any

from distui.core.config.imports.carried import Note
from distui.core.config.schema import Config, keys

TOOLS = ("deepspeed", "accelerate")


def export(config: Config, tool: str) -> tuple[dict[str, Any], list[Note]]:
    """Return the settings as `tool` nests them, and a note on each that is set and that it cannot hold."""
    table, held = _deepspeed(config) if tool == "deepspeed" else _accelerate(config)
    name = "DeepSpeed" if tool == "deepspeed" else "Accelerate"
    return table, _lost(config, held, name)


def to_text(table: dict[str, Any], tool: str) -> str:
    """Return `table` as the text of the file that `tool` reads."""
    if tool == "deepspeed":
        import json

        return json.dumps(table, indent=2) + "\n"
    import yaml

    text: str = yaml.safe_dump(table, sort_keys=True)
    return text


def _lost(config: Config, held: set[str], name: str) -> list[Note]:
    notes = []
    for key, field in keys().items():
        section, _, inner = key.partition(".")
        value = getattr(getattr(config, section), inner)
        if key not in held and value != field.get_default():
            notes.append(Note(key, "lost", f"{name}'s file has no place for {key} = {value!r}"))
    return notes


def _deepspeed(config: Config) -> tuple[dict[str, Any], set[str]]:
    held = {
        "strategy.zero_stage",
        "precision.dtype",
        "precision.reduce_dtype",
        "batch.global_size",
        "batch.micro_size",
        "batch.accumulation",
        "optimizer.max_grad_norm",
        "optimizer.name",  # the script builds it there as here
        "telemetry.profile_flops",
    }
    batch = config.batch
    table: dict[str, Any] = {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation,
    }
    table = {key: value for key, value in table.items() if value is not None}
    if "train_batch_size" not in table and "train_micro_batch_size_per_gpu" not in table:
        table["train_micro_batch_size_per_gpu"] = "auto"
    # Written even where it is 0: DeepSpeed clips at 1.0 where the key is absent.
    table["gradient_clipping"] = config.optimizer.max_grad_norm
    _deepspeed_precision(config, table, held)
    zero: dict[str, Any] = {"stage": config.strategy.zero_stage}
    for ours, theirs in (("optimizer", "offload_optimizer"), ("params", "offload_param")):
        if (home := getattr(config.offload, ours)) != "none":
            zero[theirs] = {"device": home, "pin_memory": True}
            held.add(f"offload.{ours}")
            if home == "nvme":
                zero[theirs]["nvme_path"] = config.offload.nvme_path
                held.add("offload.nvme_path")
    if config.compression.gradients == "int8":
        zero["zero_quantized_gradients"] = True
        held.add("compression.gradients")
    if getattr(config.compression, "weights", "none") == "int8":
        zero["zero_quantized_weights"] = True
        held.add("compression.weights")
    table["zero_optimization"] = zero
    if config.strategy.tensor_parallel > 1:
        table["tensor_parallel"] = {"autotp_size": config.strategy.tensor_parallel}
        held.add("strategy.tensor_parallel")
    if config.strategy.context_parallel > 1:
        table["sequence_parallel_size"] = config.strategy.context_parallel
        held.add("strategy.context_parallel")
    if config.telemetry.profile_flops:
        table["flops_profiler"] = {"enabled": True}
    if config.strategy.backend == "deepspeed":
        held.add("strategy.backend")
    return table, held


def _deepspeed_precision(config: Config, table: dict[str, Any], held: set[str]) -> None:
    precision = config.precision
    if precision.dtype == "bf16":
        table["bf16"] = {"enabled": True}
    elif precision.dtype == "fp16":
        table["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": precision.loss_scale_window}
        held.add("precision.loss_scale_window")
        power = math.log2(precision.initial_loss_scale)
        if power.is_integer() and power >= 0:  # DeepSpeed takes only powers of two
            table["fp16"]["initial_scale_power"] = int(power)
            held.add("precision.initial_loss_scale")
    table["communication_data_type"] = "fp32" if precision.reduce_dtype == "fp32" else precision.dtype


def _accelerate(config: Config) -> tuple[dict[str, Any], set[str]]:
    cluster, strategy = config.cluster, config.strategy
    held = {
        "cluster.nproc",
        "cluster.nodes",
        "cluster.node_rank",
        "cluster.master_addr",
        "cluster.master_port",
        "strategy.zero_stage",
        "precision.dtype",
        "optimizer.name",
        *(["run.device"] if config.run.device == "cpu" else []),
    }
    table: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "machine_rank": cluster.node_rank,
        "mixed_precision": "no" if config.precision.dtype == "fp32" else config.precision.dtype,
        "num_machines": cluster.nodes,
        "main_training_function": "main",
    }
    ranks = cluster.nproc * cluster.nodes if isinstance(cluster.nproc, int) else None
    if ranks is not None:
        table["num_processes"] = ranks
    if config.run.device == "cpu":
        table["use_cpu"] = True
    if cluster.nodes > 1:
        table |= {"main_process_ip": cluster.master_addr, "main_process_port": cluster.master_port}
        table["rdzv_backend"] = "static"
    if strategy.zero_stage == 0:
        table["distributed_type"] = "NO" if ranks == 1 else "MULTI_GPU"
        held |= {"strategy.backend"} if strategy.backend == "ddp" else set()
    elif strategy.backend == "fsdp2":
        table["distributed_type"], table["fsdp_config"] = "FSDP", _fsdp(config, held)
    else:
        table["distributed_type"], table["deepspeed_config"] = "DEEPSPEED", _deepspeed_plugin(config, held)
    axes = {f"parallelism_config_{short}_size": name for short, name in (("tp", "tensor"), ("cp", "context"))}
    sizes = {key: getattr(strategy, f"{name}_parallel") for key, name in axes.items()}
    if any(size > 1 for size in sizes.values()):
        table["parallelism_config"] = sizes
        held |= {f"strategy.{name}_parallel" for name in axes.values()}
    return table, held


def _fsdp(config: Config, held: set[str]) -> dict[str, Any]:
    held |= {"strategy.backend"}
    section: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": config.strategy.zero_stage == 3,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": config.activation_checkpointing.mode == "full",
        "fsdp_offload_params": config.offload.params == "cpu" and config.offload.optimizer == "cpu",
    }
    if section["fsdp_activation_checkpointing"]:
        held.add("activation_checkpointing.mode")
    if section["fsdp_offload_params"]:
        held |= {"offload.params", "offload.optimizer"}
    return section


def _deepspeed_plugin(config: Config, held: set[str]) -> dict[str, Any]:
    section: dict[str, Any] = {"zero_stage": config.strategy.zero_stage, "zero3_init_flag": False}
    for ours, theirs in (("optimizer", "offload_optimizer"), ("params", "offload_param")):
        home = getattr(config.offload, ours)
        section[f"{theirs}_device"] = home
        held.add(f"offload.{ours}")
        if home == "nvme":
            section[f"{theirs}_nvme_path"] = config.offload.nvme_path
            held.add("offload.nvme_path")
    if config.batch.accumulation is not None:
        section["gradient_accumulation_steps"] = config.batch.accumulation
        held.add("batch.accumulation")
    if config.optimizer.max_grad_norm:
        section["gradient_clipping"] = config.optimizer.max_grad_norm
        held.add("optimizer.max_grad_norm")
    return section
