"""Accelerate's FSDP and DeepSpeed plugins, as sections of distui's configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distui.compat.accelerate.refusals import refuse_argument
from distui.compat.deepspeed_json import HANDLED_BY_PLUGIN, refuse_features, refuse_lost
from distui.core.config.imports.carried import flatten
from distui.core.config.imports.deepspeed import refuse_unknown

Sections = dict[str, dict[str, Any]]
"""Section of the configuration -> key -> value."""

_STAGE_OF_STRATEGY = {
    "FULL_SHARD": 3,
    "1": 3,
    "SHARD_GRAD_OP": 2,
    "2": 2,
    "NO_SHARD": 0,
    "3": 0,
}
_UNITS_ARE_FOUND = "distui finds the repeated blocks by itself"


@dataclass
class FullyShardedDataParallelPlugin:
    """Asks for parameters, gradients and optimizer states to be sharded: distui's ZeRO stage 3, or 2.

    Fields that tune FSDP (prefetching, wrapping, original parameters) have no counterpart and need none.
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Any = None
    cpu_offload: Any = None
    ignored_modules: Any = None
    state_dict_type: Any = None
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = True
    use_orig_params: bool | None = None
    param_init_fn: Any = None
    sync_module_states: bool | None = None
    forward_prefetch: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_offload: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: list[str] | None = None
    min_num_params: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.ignored_modules is not None:
            raise refuse_argument(name, "ignored_modules", "...", "leave the modules out of what you prepare")
        if self.param_init_fn is not None:
            raise refuse_argument(name, "param_init_fn", "...", "initialise the model before prepare()")
        if self.activation_checkpointing_offload:
            raise refuse_argument(name, "activation_checkpointing_offload", True, "use activation_checkpointing=True")
        self.fsdp_version = self.fsdp_version or 1
        self.zero_stage = self._stage()

    def _stage(self) -> int:
        strategy = getattr(self.sharding_strategy, "name", self.sharding_strategy)
        if strategy is None and isinstance(self.reshard_after_forward, bool):
            return 3 if self.reshard_after_forward else 2
        strategy = str(strategy if strategy is not None else self.reshard_after_forward or "FULL_SHARD").upper()
        strategy = {"TRUE": "FULL_SHARD", "FALSE": "SHARD_GRAD_OP"}.get(strategy, strategy)
        if strategy not in _STAGE_OF_STRATEGY:
            raise refuse_argument(
                type(self).__name__,
                "sharding_strategy",
                strategy,
                "use FULL_SHARD (strategy.zero_stage=3) or SHARD_GRAD_OP (2)",
            )
        return _STAGE_OF_STRATEGY[strategy]

    def sections(self) -> Sections:
        """Return the configuration that this asks for."""
        found: Sections = {"strategy": {"zero_stage": self.zero_stage}}
        policy = type(self.cpu_offload).__name__ == "CPUOffloadPolicy"  # FSDP2's; FSDP1's has a field
        if policy or self.cpu_offload is True or getattr(self.cpu_offload, "offload_params", False):
            found["offload"] = {"params": "cpu", "optimizer": "cpu"}
        if self.activation_checkpointing:
            found["activation_checkpointing"] = {"mode": "full"}
        return found

    def set_auto_wrap_policy(self, model: Any) -> None:
        """Do nothing: distui finds the repeated blocks by itself."""

    def set_mixed_precision(self, mixed_precision: str, buffer_autocast: bool = False, override: bool = False) -> None:
        """Do nothing: the `Accelerator`'s mixed_precision counts."""

    def set_state_dict_type(self, state_dict_type: Any = None) -> None:
        """Do nothing: saved states are sharded, and `get_state_dict` gives whole ones."""


@dataclass
class DeepSpeedPlugin:
    """Asks for DeepSpeed's ZeRO: distui's own engine runs its stage, offload, clipping and accumulation."""

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float | None = None
    zero_stage: int | None = None
    is_train_batch_min: bool = True
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: bool | None = None
    msamp_opt_level: str | None = None
    deepspeed_config: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.enable_msamp:
            raise refuse_argument(type(self).__name__, "enable_msamp", True, "train in bf16")
        given = self.hf_ds_config
        if isinstance(given, (str, Path)):
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        self.deepspeed_config = dict(given or {})
        flat = flatten(self.deepspeed_config)
        refuse_features(flat)
        # Optimizer and schedule are made by `prepare`, of DummyOptim and DummyScheduler.
        made = ("optimizer", "scheduler")
        self._carried = refuse_unknown({k: v for k, v in self.deepspeed_config.items() if k not in made})
        refuse_lost(self._carried, flat, HANDLED_BY_PLUGIN)
        zero = self.deepspeed_config.setdefault("zero_optimization", {})
        self.zero_stage = int(self._choose(self.zero_stage, zero, "stage", 2))
        for which in ("optimizer", "param"):
            home = zero.setdefault(f"offload_{which}", {})
            device = self._choose(getattr(self, f"offload_{which}_device"), home, "device", "none")
            setattr(self, f"offload_{which}_device", device)
            path = self._choose(getattr(self, f"offload_{which}_nvme_path"), home, "nvme_path", None)
            setattr(self, f"offload_{which}_nvme_path", path)
        config = self.deepspeed_config
        self.gradient_accumulation_steps = int(
            self._choose(self.gradient_accumulation_steps, config, "gradient_accumulation_steps", 1)
        )
        self.gradient_clipping = self._choose(self.gradient_clipping, config, "gradient_clipping", None)

    @staticmethod
    def _choose(argument: Any, table: dict[str, Any], key: str, default: Any) -> Any:
        # The configuration wins over arguments, as in Accelerate; "auto" is what the argument says.
        known = table.get(key)
        chosen = known if known not in (None, "auto") else argument if argument is not None else default
        table[key] = chosen
        return chosen

    def sections(self) -> Sections:
        """Return the configuration that this asks for."""
        found: Sections = {}
        for key, value in self._carried.values.items():
            section, _, name = key.partition(".")
            if key not in ("optimizer.max_grad_norm", "batch.accumulation"):
                found.setdefault(section, {})[name] = value
        found.setdefault("strategy", {})["zero_stage"] = self.zero_stage
        homes = {"optimizer": self.offload_optimizer_device, "params": self.offload_param_device}
        offload: dict[str, Any] = {key: home for key, home in homes.items() if home not in (None, "none")}
        if path := self.offload_optimizer_nvme_path or self.offload_param_nvme_path:
            offload["nvme_path"] = path
        if offload:
            found["offload"] = offload
        if self.gradient_clipping:
            found.setdefault("optimizer", {})["max_grad_norm"] = float(self.gradient_clipping)
        return found

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Return the value at a dotted path of the configuration."""
        value: Any = self.deepspeed_config
        for part in ds_key_long.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def is_zero3_init_enabled(self) -> bool:
        """Return False: models are built whole, and sharded by prepare()."""
        return False
