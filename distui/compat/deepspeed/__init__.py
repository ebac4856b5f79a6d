"""The face of DeepSpeed 0.19: `from distui.compat import deepspeed`, then `deepspeed.initialize(...)`.

`distui launch --as deepspeed train.py` gives it to a script that imports `deepspeed`. Names load on first use. What is
not offered can be imported and raises where it is used, with the way around (`refusals.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distui.compat.deepspeed.refusals import install_module_refusals, offered

if TYPE_CHECKING:
    from distui.compat.deepspeed import checkpointing as checkpointing
    from distui.compat.deepspeed import comm as comm
    from distui.compat.deepspeed import zero as zero
    from distui.compat.deepspeed.accelerator import get_accelerator as get_accelerator
    from distui.compat.deepspeed.building import add_config_arguments as add_config_arguments
    from distui.compat.deepspeed.building import initialize as initialize
    from distui.compat.deepspeed.comm import init_distributed as init_distributed
    from distui.compat.deepspeed.engine import DeepSpeedEngine as DeepSpeedEngine

__version__ = "0.19.8"
"""Of the DeepSpeed whose API this is: scripts compare it."""
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__git_hash__ = __git_branch__ = git_hash = git_branch = None
TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
version = __version__

install_module_refusals()

_LAZY: dict[str, str] = {
    "initialize": "building:initialize",
    "add_config_arguments": "building:add_config_arguments",
    "init_distributed": "comm:init_distributed",
    "get_accelerator": "accelerator:get_accelerator",
    "DeepSpeedEngine": "engine:DeepSpeedEngine",
    "DeepSpeedConfig": "configuration:DeepSpeedConfig",
    "DeepSpeedConfigError": "configuration:ConfigError",
    "DeepSpeedDataLoader": "loading:DeepSpeedDataLoader",
    "OnDevice": "utils:OnDevice",
    "log_dist": "utils:log_dist",
    "logger": "utils:logger",
    **{
        name: name
        for name in (
            "accelerator",
            "checkpointing",
            "comm",
            "elasticity",
            "moe",
            "ops",
            "pipe",
            "runtime",
            "utils",
            "zero",
        )
    },
    "PipelineModule": "runtime.pipe.module:PipelineModule",
    "PipelineEngine": "runtime.pipe.engine:PipelineEngine",
    "dist": "comm",
    "DeepSpeedOptimizer": "runtime.base_optimizer:DeepSpeedOptimizer",
    **{name: f"runtime.engine:{name}" for name in ("DeepSpeedOptimizerCallable", "DeepSpeedSchedulerCallable")},
    "Optimizer": "runtime.engine:Optimizer",
    **{name: f"optim.muon:{name}" for name in ("MUON_OPTIMIZER", "QUERY", "KV", "MLA_Q", "MLA_KV", "NOT_HEAD_BLOCKED")},
    **{name: f"optim.muon:{name}" for name in ("set_optimizer_flags", "resolve_per_head_muon_after_sharding")},
    **{name: f"runtime.tensor_parallel.init_utils:{name}" for name in ("load_ds_config", "tp_model_init")},
    "set_autotp_mode": "runtime.tensor_parallel.init_utils:set_autotp_mode",
    **{
        name: f"runtime.tensor_parallel.init_utils:{name}"
        for name in ("record_tp_model_init_args", "merge_tp_model_init_into_config")
    },
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    value = offered(_LAZY, name)
    globals()[name] = value
    return value
