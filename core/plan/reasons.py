"""Why a strategy fits or not, in numbers, and how it is called. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.plan.memory import Footprint, Strategy
from distui.core.plan.request import Request
from distui.core.plan.time import Timing
from distui.core.plan.types import GIB


def is_available(strategy: Strategy) -> bool:
    """Tell whether this version of distui runs the strategy: whether `distui.core.config.check` finds nothing."""
    return _can_launch(
        strategy.backend,
        strategy.zero_stage,
        strategy.optimizer_home,
        strategy.params_home,
        strategy.compression,
        strategy.dtype,
        min(strategy.tensor_parallel, 2),
        min(strategy.pipeline_parallel, 2),
        min(strategy.context_parallel, 2),
        min(strategy.expert_parallel, 2),
        2 * (strategy.shard_size > 0),
    )


@lru_cache(maxsize=4096)
def _can_launch(
    backend: str,
    stage: int,
    optimizer_home: str,
    params_home: str,
    compression: str,
    dtype: str,
    tensor: int,
    pipeline: int,
    context: int,
    expert: int,
    shard_size: int,
) -> bool:
    config = Config.model_validate(
        {
            "strategy": {
                "backend": backend,
                "zero_stage": stage,
                "tensor_parallel": tensor,
                "pipeline_parallel": pipeline,
                "context_parallel": context,
                "expert_parallel": expert,
                "shard_size": shard_size,
            },
            "precision": {"dtype": dtype},
            "offload": {"optimizer": optimizer_home, "params": params_home},
            "compression": {"gradients": compression},
        }
    )
    # Which folder NVMe homes get is asked later.
    return all(problem.path == "offload.nvme_path" for problem in check(config))


def fits_in(request: Request, strategy: Strategy, memory: Footprint) -> bool:
    """Tell whether device, host and disk hold it, as far as their sizes are known."""
    return not misfits(request, strategy, memory)


def misfits(request: Request, strategy: Strategy, memory: Footprint) -> list[str]:
    """Return what is too small, in numbers."""
    found = []
    limit = request.limit_bytes
    if limit is not None and memory.total > limit * (1 - request.margin):
        rest = memory.buffers + memory.framework
        parts = f"model states {_gib(memory.model_states)}, activations {_gib(memory.activations + memory.logits)}"
        need = f"needs {_gib(memory.total)} of {_gib(limit)} GiB"
        if request.margin:
            need += f", of which {request.margin:.0%} ({_gib(limit * request.margin)}) are kept free"
        found.append(f"{need}: {parts}, buffers and framework {_gib(rest)}")
    ranks = request.ranks_per_node
    available = request.hardware.memory_available_bytes
    if memory.host and available is not None and memory.host * ranks > available:
        found.append(f"needs {_gib(memory.host * ranks)} of {_gib(available)} GiB host memory a node")
    rooms = [disk.free_bytes for disk in request.hardware.disks if disk.is_nvme and disk.free_bytes is not None]
    if memory.nvme and rooms and memory.nvme * ranks > max(rooms):
        found.append(f"needs {_gib(memory.nvme * ranks)} of {_gib(max(rooms))} GiB free on NVMe")
    return found


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB / 10 or num_bytes == 0 else f"{num_bytes / GIB:.3f}"


def offload_word(strategy: Strategy) -> str:
    """Return the offload as a plan writes it: `none`, `optimizer:cpu`, `optimizer:cpu,params:cpu`."""
    homes = (("optimizer", strategy.optimizer_home), ("params", strategy.params_home))
    return ",".join(f"{state}:{home}" for state, home in homes if home != "none") or "none"


def strategy_name(strategy: Strategy) -> str:
    """Return a name that is unique among the plans of one request."""
    alone = "one device" if strategy.world_size == 1 else "DDP"
    words = [alone if strategy.zero_stage == 0 else f"ZeRO-{strategy.zero_stage}"]
    if strategy.backend != "native":
        words = [f"backend {strategy.backend}"] + (words if strategy.backend != "ddp" else [])
    if strategy.shard_size:
        words.append(f"groups of {strategy.num_shards}")
    if strategy.compression != "none":
        words.append(f"{strategy.compression} gradients")
    if strategy.tensor_parallel > 1:
        words.append(f"TP {strategy.tensor_parallel}")
    if strategy.pipeline_parallel > 1:
        words.append(f"PP {strategy.pipeline_parallel}")
    if strategy.context_parallel > 1:
        words.append(f"CP {strategy.context_parallel}")
    if strategy.expert_parallel > 1:
        words.append(f"EP {strategy.expert_parallel}")
    if strategy.optimizer_home != "none":
        words.append(f"optimizer on {strategy.optimizer_home}")
    if strategy.params_home != "none":
        words.append(f"parameters on {strategy.params_home}")
    if strategy.activation_checkpointing != "none":
        words.append(f"{strategy.activation_checkpointing} checkpointing")
    return ", ".join(words)


def why(
    request: Request,
    strategy: Strategy,
    memory: Footprint,
    timing: Timing | None,
    problems: Sequence[str],
    available: bool,
    change: str,
) -> str:
    """Return the sentence of a plan."""
    parts = []
    limit = request.limit_bytes
    if problems:
        parts.append("; ".join(problems) + (f"; would fit with {change}" if change else ""))
    elif limit is None:
        parts.append(f"needs {_gib(memory.total)} GiB; how much there is is not known")
    else:
        parts.append(
            f"fits: {_gib(memory.total)} of {_gib(limit)} GiB, model states {_gib(memory.model_states)}, "
            f"activations {_gib(memory.activations + memory.logits)}"
        )
    if memory.host and request.hardware.memory_available_bytes is None:
        parts.append(
            f"needs {_gib(memory.host * request.ranks_per_node)} GiB host memory a node, whose size is not known"
        )
    if strategy.shard_size:
        parts.append(_of_groups(request, strategy))
    if timing is not None and timing.missing:
        parts.append(f"tokens/s n/a: {', '.join(timing.missing)}")
    if not available:
        parts.append("not available in this version of distui")
    return "; ".join(parts)


def _of_groups(request: Request, strategy: Strategy) -> str:
    """Return what it brings that groups of ranks hold a copy of the states each."""
    ranks, copies = strategy.num_shards, strategy.num_replicas
    nodes = -(-ranks * strategy.tensor_parallel // request.ranks_per_node)
    where = "a node" if nodes == 1 else f"{nodes} nodes"
    return (
        f"each of {copies} groups of {ranks} ranks in {where} holds a copy of the states: weights are gathered "
        f"there, and of the gradients only 1/{ranks} goes to the other copies"
    )
