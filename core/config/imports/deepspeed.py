"""DeepSpeed's JSON, key by key.

A key is either carried (a function in `_CARRIED`), or said to be needless, the script's, or lost, with the reason.
What DeepSpeed itself does not know is named with the nearest key that it does know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distui.core.config.imports.carried import Carried, flatten, truth
from distui.core.config.imports.deepspeed_remarks import REMARKS
from distui.core.errors import ConfigError, Problem

AUTO = "auto"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_OPTIMIZERS = {
    "adam": "adam",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "cpuadam": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "fusedlion": "lion",
    "cpulion": "lion",
    "muon": "muon",
    "onebitadam": "adam",
    "zerooneadam": "adam",
    "lamb": "adam",
    "fusedlamb": "adam",
}


def read(data: Mapping[str, Any]) -> Carried:
    """Return what a DeepSpeed configuration says in our settings.

    Raises:
        ConfigError: values that DeepSpeed would refuse too, all at once.
    """
    carried = Carried("DeepSpeed")
    flat = flatten(data)
    for key, value in flat.items():
        if value == AUTO and key not in REMARKS:
            if key in _CARRIED:
                carried.note(key, "script", "auto: left unset; the training script or its trainer decides")
            else:
                _remark(carried, key)
            continue
        if key in _CARRIED:
            _CARRIED[key](carried, key, value, flat)
        else:
            _remark(carried, key)
    if "gradient_clipping" not in flat:
        carried.note(
            "gradient_clipping",
            "changed",
            "absent: DeepSpeed 0.19 clips at 1.0 then; set optimizer.max_grad_norm = 1.0 to keep that, 0 clips nothing",
        )
    _batch(carried)
    return carried.finish()


def refuse_unknown(data: Mapping[str, Any]) -> Carried:
    """Return what `read` returns of a configuration to run with, the batch sizes aside, which need the number of ranks.

    Raises:
        ConfigError: every key that DeepSpeed would silently ignore, with the nearest that it knows; wrong values.
    """
    carried = read({key: value for key, value in data.items() if key not in BATCH_KEYS})
    problems = []
    for note in carried.notes:
        if note.kind == "unknown":
            near = note.why.partition("did you mean ")[2].rstrip("?")
            section = note.key.rpartition(".")[0]
            fix = f"write {f'{section}.' if section else ''}{near}" if near else "take it out"
            problems.append(Problem(note.key, "unknown key", "DeepSpeed would ignore it silently", fix))
    if problems:
        raise ConfigError(problems)
    return carried


def _batch(carried: Carried) -> None:
    sizes = (carried.values.get(f"batch.{name}") for name in ("global_size", "micro_size", "accumulation"))
    total, micro, accumulation = (size if isinstance(size, int) and size > 0 else 0 for size in sizes)
    if total and micro and accumulation:
        ranks, rest = divmod(total, micro * accumulation)
        product = f"{total} = {micro} x {accumulation} x {total / (micro * accumulation):g}"
        if rest:
            carried.wrong("train_batch_size", total, f"a multiple of {micro * accumulation} (micro x accumulation)")
        else:
            carried.note("train_batch_size", "changed", f"{product}: it asks for {ranks} data-parallel ranks")


def _remark(carried: Carried, key: str) -> None:
    """Say why a key became nothing, by the longest part of it that is known."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if remark := REMARKS.get(".".join(parts[:length])):
            kind, why = remark
            carried.note(key, kind, why)
            return
    section = ".".join(parts[:-1])
    inside = [known for known in known_keys() if known.rpartition(".")[0] == section]
    carried.unknown(key, inside or known_keys())


def known_keys() -> list[str]:
    """Return the dotted keys that this reader knows, sections among them."""
    tops = {key.split(".")[0] for key in _CARRIED}
    return sorted({*_CARRIED, *REMARKS, *tops})


# ---- what is carried -----------------------------------------------------------------------------------------------

Rule = Callable[[Carried, str, Any, Mapping[str, Any]], None]


def _to(ours: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        carried.set(ours, convert(value), key)

    return rule


def _whole(value: Any) -> Any:
    """Return 1e9, which JSON reads as a float, as the whole number that is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _group_size(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    if isinstance(value, int) and value > 1:
        carried.set("strategy.shard_size", value, key)


def _enabled(dtype: str) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        flag = truth(value)
        if flag is None:
            carried.wrong(key, value, "true, false or auto")
        elif flag:
            carried.set("precision.dtype", dtype, key)

    return rule


def _loss_scale(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    if value:
        carried.note(key, "lost", f"a fixed loss scale of {value}: ours is dynamic, from precision.initial_loss_scale")


def _scale_power(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    if isinstance(value, int) and 0 <= value <= 126:
        carried.set("precision.initial_loss_scale", 2.0**value, key)
    else:
        carried.wrong(key, value, "a whole number from 0 to 126 (the scale is 2 to its power)")


def _home(ours: str) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        if value in (None, "none"):
            return
        if value not in ("cpu", "nvme"):
            carried.wrong(key, value, "none, cpu or nvme")
            return
        if ours == "offload.params" and flat.get("zero_optimization.stage") != 3:
            carried.note(key, "lost", "DeepSpeed ignores it too: only stage 3 shards parameters")
            return
        if ours == "offload.optimizer" and not flat.get("zero_optimization.stage"):
            carried.note(key, "lost", "DeepSpeed ignores it too: stage 0 shards no optimizer states")
            return
        carried.set(ours, value, key)

    return rule


def _old_home(ours: str) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        if truth(value):
            _home(ours)(carried, key, "cpu", flat)

    return rule


def _nvme_path(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    if flat.get(key.replace("nvme_path", "device")) == "nvme":
        carried.set("offload.nvme_path", str(value), key)
    else:
        carried.note(key, "needless", "the device beside it is not nvme")


def _flag(ours: str, value_if_true: Any) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        flag = truth(value)
        if flag is None:
            carried.wrong(key, value, "true or false")
        elif flag:
            carried.set(ours, value_if_true, key)

    return rule


def _wire_format(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    compute = "fp16" if truth(flat.get("fp16.enabled")) else "bf16" if truth(flat.get("bf16.enabled")) else "fp32"
    if value == "fp32":
        carried.set("precision.reduce_dtype", "fp32", key)
    elif value == compute:
        carried.set("precision.reduce_dtype", "same", key)
    elif value is not None:
        carried.note(key, "lost", f"gradients travel as fp32 or as the compute format, which is {compute}")


def _optimizer(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    name = _OPTIMIZERS.get(str(value).lower())
    if name is None:
        carried.note(key, "lost", f"the plan counts no states for {value}; the script's own optimizer is what runs")
        return
    carried.set("optimizer.name", name, key)
    if str(value).lower() == "onebitadam":
        carried.set("compression.gradients", "onebit", key)
    carried.note(key, "script", "build it in the script; `distui launch --as deepspeed` builds it from this file")


def _freeze_step(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
    if "onebit" in str(flat.get("optimizer.type", "")).lower():
        carried.set("compression.warmup_steps", _whole(value), key)
    else:
        _remark(carried, key)


def _size(ours: str) -> Rule:
    def rule(carried: Carried, key: str, value: Any, flat: Mapping[str, Any]) -> None:
        if value and value != 1:
            carried.set(ours, value, key)

    return rule


_CARRIED: dict[str, Rule] = {
    "train_batch_size": _to("batch.global_size", _whole),
    "train_micro_batch_size_per_gpu": _to("batch.micro_size", _whole),
    "gradient_accumulation_steps": _to("batch.accumulation", _whole),
    "gradient_clipping": _to("optimizer.max_grad_norm", lambda value: float(value) if value is not True else value),
    "fp16.enabled": _enabled("fp16"),
    "fp16.loss_scale": _loss_scale,
    "fp16.initial_scale_power": _scale_power,
    "fp16.loss_scale_window": _to("precision.loss_scale_window", _whole),
    "bf16.enabled": _enabled("bf16"),
    "bfloat16.enabled": _enabled("bf16"),
    "communication_data_type": _wire_format,
    "data_types.grad_accum_dtype": _wire_format,
    "zero_optimization": _flag("strategy.zero_stage", 1),
    "zero_optimization.stage": _to("strategy.zero_stage", _whole),
    "zero_optimization.mics_shard_size": _group_size,
    "zero_optimization.offload_optimizer.device": _home("offload.optimizer"),
    "zero_optimization.offload_optimizer.nvme_path": _nvme_path,
    "zero_optimization.offload_param.device": _home("offload.params"),
    "zero_optimization.offload_param.nvme_path": _nvme_path,
    "zero_optimization.cpu_offload": _old_home("offload.optimizer"),
    "zero_optimization.cpu_offload_param": _old_home("offload.params"),
    "zero_optimization.cpu_offload_params": _old_home("offload.params"),
    "zero_optimization.zero_quantized_gradients": _flag("compression.gradients", "int8"),
    "zero_optimization.zero_quantized_weights": _flag("compression.weights", "int8"),
    "optimizer.type": _optimizer,
    "optimizer.params.freeze_step": _freeze_step,
    "flops_profiler.enabled": _flag("telemetry.profile_flops", True),
    "tensor_parallel.autotp_size": _size("strategy.tensor_parallel"),
    "tensor_parallel.tp.tp_size": _size("strategy.tensor_parallel"),
    "sequence_parallel_size": _size("strategy.context_parallel"),
}
