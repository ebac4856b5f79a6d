"""Accelerate's YAML (what `accelerate config` writes, and its templates), key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distui.core.config.imports import deepspeed
from distui.core.config.imports.carried import Carried, Kind, truth
from distui.core.config.imports.parsing import read_json
from distui.core.errors import UserError

_ONE = ("NO",)
_MANY = ("MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU")
_OTHERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")

_STAGE_OF_SHARDING = {
    "FULL_SHARD": 3,
    "SHARD_GRAD_OP": 2,
    "NO_SHARD": 0,
    "HYBRID_SHARD": 3,
    "HYBRID_SHARD_ZERO2": 2,
}
"""FSDP's names for what is sharded; older files hold their place in this list, counted from 1."""


def read(data: Mapping[str, Any], folder: Path) -> Carried:
    """Return what an Accelerate configuration says in our settings.

    `folder` is where the file lies: a DeepSpeed JSON that it names is read from there.

    Raises:
        ConfigError: values that Accelerate would refuse too, all at once.
        UserError: a machine that distui does not run on.
    """
    carried = Carried("Accelerate")
    kind = str(data.get("distributed_type", "NO")).upper()
    where = str(data.get("compute_environment", "LOCAL_MACHINE")).upper()
    if where != "LOCAL_MACHINE" or kind in ("XLA", "TPU"):
        raise UserError(
            f"this configuration is for {where if where != 'LOCAL_MACHINE' else kind}",
            "distui runs on the CPUs and GPUs of machines that you can log in to",
            "import the configuration of such a machine, or start from `distui setup`",
        )
    if kind not in (*_ONE, *_MANY, *_OTHERS):
        carried.wrong("distributed_type", data.get("distributed_type"), ", ".join((*_ONE, *_MANY, *_OTHERS)))
    sections: dict[str, Callable[[Carried, Mapping[str, Any], Path], None]] = {
        "fsdp_config": _fsdp,
        "deepspeed_config": _deepspeed,
        "megatron_lm_config": _megatron,
        "parallelism_config": _parallelism,
    }
    wanted = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM"}
    for key, value in data.items():
        if key in sections:
            if not isinstance(value, Mapping):
                if value:
                    carried.wrong(key, value, "a section")
            elif wanted.get(key, kind) != kind and value:
                carried.note(key, "needless", f"distributed_type is {kind}, so Accelerate does not read it")
            else:
                sections[key](carried, value, folder)
        elif key not in _TOP:
            if remark := _REMARKS.get(key):
                if value:
                    carried.note(key, *remark)
            else:
                carried.unknown(key, [*sections, *_TOP, *_REMARKS])
    for section, own in wanted.items():
        if own == kind and not data.get(section):
            sections[section](carried, {}, folder)  # the engine's own defaults
    _cluster(carried, data, kind)
    _precision(carried, data)
    return carried.finish()


def _cluster(carried: Carried, data: Mapping[str, Any], kind: str) -> None:
    machines = data.get("num_machines", 1)
    ranks = data.get("num_processes", 1 if kind in _ONE else None)
    if isinstance(machines, int) and machines > 1:
        carried.set("cluster.nodes", machines, "num_machines")
        carried.set("cluster.node_rank", data.get("machine_rank") or 0, "machine_rank")
        if address := data.get("main_process_ip"):
            carried.set("cluster.master_addr", str(address), "main_process_ip")
    elif any(data.get(key) for key in ("machine_rank", "main_process_ip")):
        for key in ("machine_rank", "main_process_ip"):
            if data.get(key):
                carried.note(key, "needless", "num_machines is 1: there is nobody to meet")
    if (port := data.get("main_process_port")) and isinstance(machines, int) and machines > 1:
        carried.set("cluster.master_port", int(port), "main_process_port")
    elif port:
        carried.note("main_process_port", "needless", "one node meets on a free port")
    if isinstance(ranks, int) and ranks > 0 and isinstance(machines, int) and machines > 0:
        if ranks % machines:
            carried.wrong("num_processes", ranks, f"a multiple of num_machines={machines}")
        else:
            if machines > 1:
                carried.note(
                    "num_processes", "changed", f"{ranks} ranks on {machines} machines: {ranks // machines} each"
                )
            carried.set("cluster.nproc", ranks // machines, "num_processes")
    if truth(data.get("use_cpu")):
        carried.set("run.device", "cpu", "use_cpu")
    ids = data.get("gpu_ids")
    if ids not in (None, "all"):
        carried.note("gpu_ids", "lost", f"start it with CUDA_VISIBLE_DEVICES={ids}")


def _precision(carried: Carried, data: Mapping[str, Any]) -> None:
    form = data.get("mixed_precision")
    if form is None or form is False or str(form).lower() == "no":
        if truth(data.get("fp16")):
            carried.set("precision.dtype", "fp16", "fp16")
        return
    if str(form).lower() == "fp8":
        carried.set("precision.dtype", "bf16", "mixed_precision")
        carried.note("mixed_precision", "changed", "fp8 matrix multiplications are not offered: bf16 is taken")
    elif str(form).lower() in ("fp16", "bf16"):
        carried.set("precision.dtype", str(form).lower(), "mixed_precision")
    else:
        carried.wrong("mixed_precision", form, "no, fp16, bf16 or fp8")


def _fsdp(carried: Carried, section: Mapping[str, Any], folder: Path) -> None:
    stage = 3
    for key, value in section.items():
        name = key.removeprefix("fsdp_")
        if name in ("sharding_strategy", "reshard_after_forward") and truth(value) is None:
            word = str(value)
            if word.isdigit() and 1 <= int(word) <= len(_STAGE_OF_SHARDING):
                word = list(_STAGE_OF_SHARDING)[int(word) - 1]
            if word not in _STAGE_OF_SHARDING:
                carried.wrong(f"fsdp_config.{key}", value, ", ".join(_STAGE_OF_SHARDING))
                continue
            stage = _STAGE_OF_SHARDING[word]
            if word.startswith("HYBRID"):
                why = "states are sharded over all ranks; strategy.shard_size = ranks of a node keeps a copy in each"
                carried.note(f"fsdp_config.{key}", "changed", why)
        elif name == "reshard_after_forward" or name == "sharding_strategy":
            stage = 3 if truth(value) else 2
        elif name == "activation_checkpointing":
            if truth(value):
                carried.set("activation_checkpointing.mode", "full", f"fsdp_config.{key}")
        elif name == "offload_params":
            if truth(value):
                carried.set("offload.params", "cpu", f"fsdp_config.{key}")
                carried.set("offload.optimizer", "cpu", f"fsdp_config.{key}")
        elif remark := _FSDP_REMARKS.get(name):
            carried.note(f"fsdp_config.{key}", *remark)
        else:
            known = ["sharding_strategy", "reshard_after_forward", "activation_checkpointing", "offload_params"]
            carried.unknown(f"fsdp_config.{key}", [f"fsdp_{other}" for other in (*known, *_FSDP_REMARKS)])
    if carried.values.get("offload.params") and stage != 3:
        del carried.values["offload.params"]
        carried.note("fsdp_config.fsdp_offload_params", "changed", f"stage {stage} keeps parameters on the device")
        if stage == 0:
            del carried.values["offload.optimizer"]
    carried.set("strategy.zero_stage", stage, "fsdp_config")


def _deepspeed(carried: Carried, section: Mapping[str, Any], folder: Path) -> None:
    if name := section.get("deepspeed_config_file"):
        path = Path(str(name)).expanduser()
        inner = deepspeed.read(read_json(path if path.is_absolute() else folder / path))
        carried.values |= inner.values
        carried.notes += inner.notes
    as_json: dict[str, Any] = {}
    zero: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("gradient_accumulation_steps", "gradient_clipping"):
            as_json[key] = value
        elif key == "zero_stage":
            zero["stage"] = value
        elif place := _DEEPSPEED_HOMES.get(key):
            if value not in (None, "none"):
                zero.setdefault(place[0], {})[place[1]] = value
        elif remark := _DEEPSPEED_REMARKS.get(key):
            carried.note(f"deepspeed_config.{key}", *remark)
        elif key != "deepspeed_config_file":
            known = ["gradient_accumulation_steps", "gradient_clipping", "zero_stage", "deepspeed_config_file"]
            carried.unknown(f"deepspeed_config.{key}", [*known, *_DEEPSPEED_HOMES, *_DEEPSPEED_REMARKS])
    if not name:
        zero.setdefault("stage", 2)  # what Accelerate's plugin takes
        as_json.setdefault("gradient_clipping", deepspeed.AUTO)
    inner = deepspeed.read({**as_json, "zero_optimization": zero} if zero else as_json)
    carried.values |= inner.values
    carried.notes += [note for note in inner.notes if note.key != "gradient_clipping"]


def _megatron(carried: Carried, section: Mapping[str, Any], folder: Path) -> None:
    sizes = {"tp_degree": "tensor", "pp_degree": "pipeline", "context_parallel_size": "context"}
    sizes["expert_model_parallel_size"] = "expert"
    for key, value in section.items():
        name = key.removeprefix("megatron_lm_")
        if name in sizes:
            if value not in (None, 1):
                carried.set(f"strategy.{sizes[name]}_parallel", int(value), f"megatron_lm_config.{key}")
        elif name == "gradient_clipping":
            carried.set("optimizer.max_grad_norm", float(value), f"megatron_lm_config.{key}")
        elif name == "use_distributed_optimizer":
            shards_all = section.get("megatron_lm_use_custom_fsdp", section.get("use_custom_fsdp"))
            if truth(value) and not truth(shards_all):
                carried.set("strategy.zero_stage", 1, f"megatron_lm_config.{key}")
        elif name == "use_custom_fsdp":
            if truth(value):
                carried.set("strategy.zero_stage", 3, f"megatron_lm_config.{key}")
        elif name == "optimizer_cpu_offload":
            if truth(value):
                carried.set("offload.optimizer", "cpu", f"megatron_lm_config.{key}")
        elif name == "num_micro_batches":
            _micro_batches(carried, f"megatron_lm_config.{key}", value, section)
        elif name in ("recompute_activations", "recompute_granularity"):
            if truth(value) or value in ("full", "selective"):
                mode = value if value in ("full", "selective") else "selective"
                carried.set("activation_checkpointing.mode", mode, f"megatron_lm_config.{key}")
        elif name in _MEGATRON_LOST:
            carried.note(f"megatron_lm_config.{key}", "lost", "Megatron-LM's own models and options are not used")
        else:
            carried.unknown(
                f"megatron_lm_config.{key}", [f"megatron_lm_{other}" for other in (*sizes, *_MEGATRON_LOST)]
            )


def _micro_batches(carried: Carried, key: str, value: Any, section: Mapping[str, Any]) -> None:
    stages = section.get("megatron_lm_pp_degree", section.get("pp_degree")) or 1
    if value in (None, 1):
        return
    if stages > 1:
        carried.set("batch.accumulation", int(value), key)
    else:
        carried.note(key, "lost", "without a pipeline the script's own loop accumulates: batch.accumulation")


def _parallelism(carried: Carried, section: Mapping[str, Any], folder: Path) -> None:
    axes = {"tp_size": "tensor", "cp_size": "context", "sp_size": "context", "ep_size": "expert"}
    for key, value in section.items():
        name = key.removeprefix("parallelism_config_")
        if name in axes:
            if value not in (None, 1):
                carried.set(f"strategy.{axes[name]}_parallel", value, f"parallelism_config.{key}")
        elif name == "dp_shard_size":
            copies = section.get("parallelism_config_dp_replicate_size", section.get("dp_replicate_size"))
            if value not in (None, 1) and copies not in (None, 1):
                carried.set("strategy.shard_size", value, f"parallelism_config.{key}")
            else:
                why = "ranks that no other axis takes are data-parallel"
                carried.note(f"parallelism_config.{key}", "needless", why)
        elif name == "dp_replicate_size":
            why = "data-parallel ranks that share no states are copies of each other"
            carried.note(f"parallelism_config.{key}", "needless", why)
        elif name.startswith(("cp_", "sp_")):
            carried.note(f"parallelism_config.{key}", "needless", "the engine chooses how a sequence is shared")
        else:
            known = [*axes, "dp_shard_size", "dp_replicate_size"]
            carried.unknown(f"parallelism_config.{key}", [f"parallelism_config_{other}" for other in known])


_TOP = {
    "compute_environment",
    "distributed_type",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "mixed_precision",
    "fp16",
    "use_cpu",
    "gpu_ids",
}
_MEGATRON_LOST = {
    "attention_backend",
    "attention_dropout",
    "attention_softmax_in_fp32",
    "calculate_per_token_loss",
    "decoder_last_pipeline_num_layers",
    "eod_mask_loss",
    "expert_tensor_parallel_size",
    "hidden_dropout",
    "no_load_optim",
    "no_save_optim",
    "overlap_cpu_optimizer_d2h_h2d",
    "recompute_method",
    "recompute_num_layers",
    "sequence_parallelism",
    "use_precision_aware_optimizer",
    "use_rotary_position_embeddings",
}
_TPU: tuple[Kind, str] = ("lost", "TPUs are not supported")
_REMARKS: dict[str, tuple[Kind, str]] = {
    "debug": ("needless", "collectives are always watched: a mismatch is named as it happens"),
    "rdzv_backend": ("needless", "ranks meet at cluster.master_addr"),
    "same_network": ("needless", "ranks meet at cluster.master_addr"),
    "main_training_function": ("needless", "only TPUs and notebooks need it"),
    "enable_cpu_affinity": ("lost", "set cluster.threads_per_rank; ranks are not pinned to cores"),
    "dynamo_config": ("script", "torch.compile(block) in the script"),
    "dynamo_backend": ("script", "torch.compile(block) in the script"),
    "fp8_config": ("lost", "fp8 matrix multiplications are not offered"),
    "mpirun_config": ("needless", "ranks are started without MPI"),
    "ipex_config": ("lost", "Intel's extension is not used"),
    "use_xpu": ("lost", "XPUs are not supported"),
    "downcast_bf16": _TPU,
    **{f"tpu_{name}": _TPU for name in ("name", "zone", "use_cluster", "use_sudo", "vm", "env")},
    "command_file": _TPU,
    "commands": _TPU,
}
_FOUND: tuple[Kind, str] = ("needless", "the model's repeated blocks are found, whatever their class")
_AHEAD: tuple[Kind, str] = ("needless", "the next block is always gathered ahead, in the order of the first forward")
_FSDP_REMARKS: dict[str, tuple[Kind, str]] = {
    "version": ("needless", "our own engine shards; strategy.backend = fsdp2 takes PyTorch's"),
    "auto_wrap_policy": _FOUND,
    "transformer_layer_cls_to_wrap": _FOUND,
    "min_num_params": _FOUND,
    "backward_prefetch": _AHEAD,
    "backward_prefetch_policy": _AHEAD,
    "forward_prefetch": _AHEAD,
    "state_dict_type": ("needless", "engine.save_state shards, engine.save_model writes whole weights"),
    "sync_module_states": ("needless", "all ranks start from rank 0's weights"),
    "use_orig_params": ("needless", "parameters stay the model's own"),
    "cpu_ram_efficient_loading": (
        "lost",
        "at stage 3 transformers' weights stay in their files until each rank reads its part",
    ),
    "activation_checkpointing_offload": ("lost", "not offered"),
}
_DEEPSPEED_HOMES = {
    "offload_optimizer_device": ("offload_optimizer", "device"),
    "offload_optimizer_nvme_path": ("offload_optimizer", "nvme_path"),
    "offload_param_device": ("offload_param", "device"),
    "offload_param_nvme_path": ("offload_param", "nvme_path"),
}
_DEEPSPEED_REMARKS: dict[str, tuple[Kind, str]] = {
    "zero3_init_flag": ("needless", "build the model as you always do; engine.prepare shards it"),
    "zero3_save_16bit_model": ("needless", "engine.save_model writes whole weights"),
    "deepspeed_multinode_launcher": ("needless", "see `distui launch --nodes`"),
    "deepspeed_hostfile": ("lost", "name the hosts: `distui launch --nodes`"),
    "deepspeed_inclusion_filter": ("lost", "name the hosts: `distui launch --nodes`"),
    "deepspeed_exclusion_filter": ("lost", "name the hosts: `distui launch --nodes`"),
    "deepspeed_moe_layer_cls_names": ("needless", "the model's repeated blocks are found"),
}
