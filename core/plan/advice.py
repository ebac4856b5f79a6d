"""The least change that makes a strategy fit, found by trying. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from distui.core.plan.memory import Strategy, footprint
from distui.core.plan.request import Request
from distui.core.plan.types import GIB, ModelSpec

MAX_RANKS = 1 << 14


def smallest_change(request: Request, strategy: Strategy) -> str:
    """Return the first change in this order that fits: batch, checkpointing, stage, more ranks, offload, sequence.

    The order is by what a change costs the user; only one thing is changed at a time. Empty where none helps.
    """
    limit = request.limit_bytes
    if limit is None:
        return ""
    room = limit * (1 - request.margin)
    kind = request.hardware.device_kind
    host = request.hardware.memory_available_bytes

    def fits(changed: Strategy, model: ModelSpec = request.model) -> float | None:
        memory = footprint(model, changed, kind)
        if host is not None and memory.host * request.ranks_per_node > host:
            return None
        return memory.total / GIB if memory.total <= room else None

    for words, changed in _changes(strategy, kind):
        found = fits(changed)
        if found is not None:
            return f"{words} ({found:.1f} GiB)"
    if strategy.zero_stage > 0:
        ranks = _least_ranks(strategy, lambda changed: fits(changed) is not None)
        if ranks is not None:
            return f"{ranks} ranks instead of {strategy.world_size}"
    for words, changed in _offloads(strategy, kind):
        found = fits(changed)
        if found is not None:
            return f"{words} ({found:.1f} GiB)"
    length = request.model.sequence_length // 2
    while length >= 128:
        found = fits(strategy, replace(request.model, sequence_length=length))
        if found is not None:
            return f"sequences of {length} tokens ({found:.1f} GiB)"
        length //= 2
    return ""


def _changes(strategy: Strategy, kind: str) -> Iterator[tuple[str, Strategy]]:
    micro = strategy.micro_size // 2
    while micro >= 1:
        yield f"micro_size {micro}", replace(strategy, micro_size=micro)
        micro //= 2
    for mode in ("selective", "full"):
        if strategy.activation_checkpointing == "none" or (strategy.activation_checkpointing, mode) == (
            "selective",
            "full",
        ):
            yield f"{mode} activation checkpointing", replace(strategy, activation_checkpointing=mode)
    if strategy.data_parallel > 1 and strategy.pipeline_parallel == 1:
        for stage in range(strategy.zero_stage + 1, 4):
            yield f"ZeRO-{stage}", replace(strategy, zero_stage=stage)
        if strategy.activation_checkpointing != "full":
            for stage in range(strategy.zero_stage + 1, 4):
                changed = replace(strategy, zero_stage=stage, activation_checkpointing="full")
                yield f"ZeRO-{stage} and full activation checkpointing", changed


def _offloads(strategy: Strategy, kind: str) -> Iterator[tuple[str, Strategy]]:
    if kind != "cuda" or strategy.optimizer_home != "none":
        return
    stage = max(1, strategy.zero_stage)
    yield "the optimizer on cpu", replace(strategy, zero_stage=stage, optimizer_home="cpu")
    if strategy.pipeline_parallel == 1:
        changed = replace(strategy, zero_stage=3, optimizer_home="cpu", params_home="cpu")
        yield "ZeRO-3, optimizer and parameters on cpu", changed
        changed = replace(changed, activation_checkpointing="full")
        yield "ZeRO-3, optimizer and parameters on cpu, full activation checkpointing", changed


def _least_ranks(strategy: Strategy, fits: Callable[[Strategy], bool]) -> int | None:
    """Return the least world size that fits, by doubling and then halving the interval."""
    cut = strategy.tensor_parallel * strategy.pipeline_parallel
    low, high = strategy.data_parallel, strategy.data_parallel * 2
    while not fits(replace(strategy, data_parallel=high)):
        low, high = high, high * 2
        if high * cut > MAX_RANKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(strategy, data_parallel=middle)):
            high = middle
        else:
            low = middle
    return high * cut
