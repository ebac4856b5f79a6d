"""The real Accelerate beside this face: whoever asks it for state, rank, device or seed gets the job's.

Libraries (transformers, TRL, PEFT) import Accelerate by its own name, whatever the script itself uses.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from distui.core.ranks.process import ProcessState

HELD: dict[str, dict[str, Any]] = {"PartialState": {}, "AcceleratorState": {}, "GradientState": {}}
"""What every instance of the face's states holds, by their name."""

OWN_ENV = "DISTUI_TRAINER"
"""Set to `accelerate`, it leaves Trainer its own Accelerate; telemetry comes all the same."""


def join(timeout: Any, backend: str | None) -> ProcessState:
    """Join the job. Collective on the first call."""
    if timeout is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Two backends in one group, as the engine makes it; here only for the sake of the timeout.
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend if backend and backend != "nccl" else both, timeout=timeout)
        process = ProcessState()
        process._owns_group = True
        return process
    return ProcessState()


def install(real: ModuleType) -> None:
    """Make `accelerate.state` agree with the face, from its import on and whichever of the two is asked first."""
    if os.environ.get(OWN_ENV) == "accelerate":
        return
    kind: Any = real.PartialState
    own = kind.__init__

    @functools.wraps(own)
    def join_first(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        process = None
        if not kind._shared_state and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "transformers" in sys.modules:
            # Trainer's engine comes later, and needs gloo beside NCCL.
            process = join(kwargs.get("timeout"), kwargs.get("backend"))
        own(self, cpu, **kwargs)
        if process is not None and kind._shared_state["num_processes"] == 1:
            # On a machine without GPUs Accelerate counts the ranks only where it is told to use the CPU.
            _place(real, process, dist.get_backend())

    kind.__init__ = join_first
    agree()


def agree() -> None:
    """Give the real Accelerate's shared states, where it is loaded, what the face's hold."""
    real: Any = sys.modules.get("accelerate.state")
    if not hasattr(real, "GradientState"):  # not loaded, or about to be
        return
    ours = HELD["AcceleratorState"]
    if ours:
        partial = ours["_partial"]
        if not real.PartialState._shared_state:
            real.PartialState._shared_state.update(_cpu=partial._cpu, debug=False, fork_launched=partial.fork_launched)
        _place(real, partial, partial.backend)
        there = real.AcceleratorState._shared_state
        if not there:
            there.update(deepspeed_plugins=None, torch_tp_plugin=None, device_mesh=None, parallelism_config=None)
            there["dynamo_plugin"] = _no_dynamo()
        there.update(real.PartialState._shared_state)
        there["_mixed_precision"] = ours["_mixed_precision"]
    gradients = HELD["GradientState"]
    if gradients:
        real.GradientState._shared_state.update(
            sync_gradients=gradients["sync_gradients"],
            plugin_kwargs=gradients["plugin_kwargs"],
            _dataloader_references_ref=[None, *gradients["_references"]],
            _is_xla_gradients_synced=False,
        )


def _place(real: Any, process: Any, backend: str | None) -> None:
    several = process.num_processes > 1
    kind = ("MULTI_GPU" if process.device.type == "cuda" else "MULTI_CPU") if several else "NO"
    real.PartialState._shared_state.update(
        backend=backend,
        device=process.device,
        num_processes=process.num_processes,
        process_index=process.process_index,
        local_process_index=process.local_process_index,
        # Never FSDP or DEEPSPEED: what asks would look for their wrappers around the model.
        distributed_type=real.DistributedType[kind],
    )


def forget(name: str) -> None:
    """Reset a state of the real Accelerate too, where it is loaded."""
    real = getattr(sys.modules.get("accelerate.state"), name, None)
    if real is not None:
        real._shared_state.clear()


def _no_dynamo() -> Any:
    from importlib import import_module

    return import_module("accelerate.utils").TorchDynamoPlugin(backend="NO")
