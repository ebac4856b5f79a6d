"""The least change that makes a strategy fit, found by trying. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from distui.core.plan.memory import Strategy, footprint
from distui.core.plan.reasons import is_available
from distui.core.plan.request import Request
from distui.core.plan.types import GIB, ModelSpec

MAX_RANKS = 1 << 14
TILE = 2048
"""Tokens at a time, of which matrices are about as fast as of more."""


def smallest_change(request: Request, strategy: Strategy) -> str:
    """Return the first change in this order that fits: batch, checkpointing, stage, more ranks, offload, sequence.

    The order is by what a change costs the user. What this version can run goes before what it cannot. Empty where
    nothing helps.
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

    later = ""
    for words, changed, model in _candidates(request, strategy, kind, lambda changed: fits(changed) is not None):
        found = fits(changed, model)
        if found is None:
            continue
        if is_available(changed) or not is_available(strategy):
            return f"{words} ({found:.1f} GiB)"
        later = later or f"{words} ({found:.1f} GiB), which this version cannot run yet"
    return later


def _candidates(
    request: Request, strategy: Strategy, kind: str, fits: Callable[[Strategy], bool]
) -> Iterator[tuple[str, Strategy, ModelSpec]]:
    """Yield what may be changed, the least first."""
    model = request.model
    for words, changed in _changes(strategy, kind):
        yield words, changed, model
    if strategy.zero_stage > 0 and not strategy.shard_size:  # more copies leave each as large
        data_parallel = _least_data_parallel(strategy, fits)
        if data_parallel is not None:
            wider = replace(strategy, data_parallel=data_parallel)
            yield f"{wider.world_size} ranks instead of {strategy.world_size}", wider, model
    for words, changed in _offloads(strategy, kind):
        yield words, changed, model
    length = model.sequence_length // 2
    while length >= 128:
        yield f"sequences of {length} tokens", strategy, replace(model, sequence_length=length)
        length //= 2


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
    if not strategy.loss_tile and kind == "cuda":
        tiles = replace(strategy, mlp_tile=TILE, loss_tile=TILE, activation_checkpointing="full")
        yield f"full activation checkpointing, feed-forwards and loss in tiles of {TILE} tokens", tiles
    if strategy.shard_size:
        yield f"states shared by all {strategy.data_parallel} data-parallel ranks", replace(strategy, shard_size=0)
    if strategy.num_shards > 1 and strategy.pipeline_parallel == 1:
        if strategy.backend == "ddp":
            return
        was_onebit = strategy.compression == "onebit"
        if was_onebit:  # it needs the whole momentum on every rank
            strategy = replace(strategy, compression="none")
            yield "gradients not compressed", strategy
        plain = ", gradients not compressed" if was_onebit else ""
        for stage in range(strategy.zero_stage + 1, 4):
            yield f"ZeRO-{stage}{plain}", replace(strategy, zero_stage=stage)
        if strategy.activation_checkpointing != "full":
            for stage in range(strategy.zero_stage + 1, 4):
                changed = replace(strategy, zero_stage=stage, activation_checkpointing="full")
                yield f"ZeRO-{stage} and full activation checkpointing{plain}", changed


def _offloads(strategy: Strategy, kind: str) -> Iterator[tuple[str, Strategy]]:
    if kind != "cuda" or strategy.optimizer_home != "none" or strategy.backend != "native":
        return
    if strategy.compression != "none":
        return
    stage = max(1, strategy.zero_stage)
    yield "the optimizer on cpu", replace(strategy, zero_stage=stage, optimizer_home="cpu")
    if strategy.pipeline_parallel == 1:
        if stage < 2:  # gradients leave the device too
            yield "ZeRO-2, optimizer on cpu", replace(strategy, zero_stage=2, optimizer_home="cpu")
        changed = replace(strategy, zero_stage=3, optimizer_home="cpu", params_home="cpu")
        yield "ZeRO-3, optimizer and parameters on cpu", changed
        changed = replace(changed, activation_checkpointing="full")
        yield "ZeRO-3, optimizer and parameters on cpu, full activation checkpointing", changed


def _least_data_parallel(strategy: Strategy, fits: Callable[[Strategy], bool]) -> int | None:
    """Return the least number of data-parallel ranks that fits, by doubling and then halving the interval."""
    cut = strategy.tensor_parallel * strategy.pipeline_parallel * strategy.context_parallel
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
    return high
