"""Every strategy for a model on given hardware, ranked, with the reason for those that do not fit. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware
from distui.core.plan.advice import smallest_change
from distui.core.plan.explain import explain
from distui.core.plan.memory import EIGHT_BIT, OPTIMIZER_STATE_BYTES, Footprint, Strategy, footprint
from distui.core.plan.rates import Rates, rates_of
from distui.core.plan.reasons import fits_in, is_available, misfits, offload_word, strategy_name, why
from distui.core.plan.request import DEFAULT_MARGIN, Request, default_dtype
from distui.core.plan.time import Timing, step_time
from distui.core.plan.types import ModelSpec, Plan

__all__ = ["Goal", "Request", "default_dtype", "explain", "plan_all", "strategies"]

Goal = Literal["throughput", "memory", "cost"]

MICRO_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_MICRO_TOKENS = 16384
"""A micro-batch of more tokens no longer makes matrices faster; accumulation does the rest."""

ENOUGH_MICRO_TOKENS = 4096

MIN_CONTEXT_TOKENS = 2048
"""Below this many tokens a rank, cutting the sequence only adds communication."""

BACKENDS: dict[str, tuple[int, ...]] = {
    "native": (0, 1, 2, 3),
    "ddp": (0,),
    "fsdp2": (2, 3),
    "deepspeed": (0, 1, 2, 3),
}
"""The stages of each backend that the planner knows."""

COMPRESSIONS = ("none", "onebit", "int8", "fp8")


def plan_all(
    model: ModelSpec,
    hardware: Hardware,
    *,
    nproc: int | None = None,
    global_size: int | None = None,
    micro_size: int | None = None,
    sequence_length: int | None = None,
    dtype: str | None = None,
    reduce_dtype: str = "fp32",
    optimizer: str = "adamw",
    margin: float = DEFAULT_MARGIN,
    goal: Goal = "throughput",
    available_only: bool = False,
    backends: Sequence[str] = ("native",),
    compressions: Sequence[str] = ("none",),
) -> list[Plan]:
    """Return every strategy with its best micro-batch: those that fit first, ranked by `goal`, then the others.

    `backends` and `compressions` widen the search (BACKENDS, COMPRESSIONS have all of them).
    `nproc` is ranks a node. Without `global_size` the optimizer steps after one micro-batch. Raises: UserError where
    an option cannot be.
    """
    if sequence_length is not None:
        model = replace(model, sequence_length=sequence_length)
    request = Request(
        model=model,
        hardware=hardware,
        ranks_per_node=_ranks_per_node(hardware, nproc),
        dtype=dtype or default_dtype(hardware),
        reduce_dtype=reduce_dtype,
        optimizer=optimizer,
        margin=margin,
        global_size=global_size,
        micro_size=micro_size,
        backends=tuple(backends),
        compressions=tuple(compressions),
    )
    _check(request)
    requests = [request]
    if goal == "cost" and nproc is None and hardware.nodes == 1:
        # Fewer ranks cost less: every power of two of them is a choice of its own.
        fewer = [1 << power for power in range(10) if 1 << power < request.ranks_per_node]
        requests += [replace(request, ranks_per_node=n, name_suffix=f", nproc {n}") for n in fewer]
    plans = [plan for each in requests for plan in plan_request(each, available_only)]
    return sorted(plans, key=lambda plan: _rank(plan, goal))


def _ranks_per_node(hardware: Hardware, nproc: int | None) -> int:
    if nproc is None:
        return hardware.ranks_per_node
    if nproc < 1 or (hardware.gpus_per_node and nproc > len(hardware.gpus_per_node)):
        raise UserError(
            f"nproc={nproc} ranks a node cannot be",
            f"{hardware.name} has {len(hardware.gpus_per_node)} GPUs a node",
            f"set nproc to 1..{max(1, hardware.ranks_per_node)}",
        )
    return nproc


def _check(request: Request) -> None:
    for option, value in (("global_size", request.global_size), ("micro_size", request.micro_size)):
        if value is not None and value < 1:
            raise UserError(f"{option}={value} is no batch size", "it counts samples", f"set {option} to 1 or more")
    if request.dtype not in ("fp32", "bf16", "fp16"):
        raise UserError(f"dtype={request.dtype} is unknown", "formats are fp32, bf16, fp16", "write one of these")
    for kind, choices, given in (
        ("backend", tuple(BACKENDS), request.backends),
        ("compression", COMPRESSIONS, request.compressions),
    ):
        for choice in given:
            if choice not in choices:
                listed = ", ".join(choices)
                raise UserError(f"{kind} {choice!r} is not planned", f"known are {listed}", "write some of these")
    if request.optimizer not in OPTIMIZER_STATE_BYTES:
        known = ", ".join(OPTIMIZER_STATE_BYTES)
        raise UserError(f"optimizer {request.optimizer!r} is unknown", f"known are {known}", "write one of these")
    if request.model.sequence_length < 1 or not 0 <= request.margin < 1:
        raise UserError(
            f"sequence length {request.model.sequence_length} or margin {request.margin} cannot be",
            "a sequence has at least one token; a margin is a share of the memory from 0 to below 1",
            "give a positive length, and a margin such as 0.08",
        )


def plan_request(request: Request, available_only: bool = False) -> Iterator[Plan]:
    """Yield one plan for each combination of stage, homes, checkpointing and model parallelism."""
    rates = rates_of(request.hardware, request.dtype, request.ranks_per_node)
    for strategy in strategies(request):
        if available_only and not is_available(strategy):
            continue
        yield best_micro(request, strategy, rates)


def strategies(request: Request) -> Iterator[Strategy]:
    """Yield every legal combination, with micro_size 1 and accumulation 1."""
    world = request.world_size
    for tensor, pipeline, context in _model_parallel(request):
        data = world // (tensor * pipeline * context)
        for stage, optimizer_home, params_home in _placements(request.hardware, data * context, pipeline):
            at_home = optimizer_home == params_home == "none"
            if not at_home and request.optimizer.endswith(EIGHT_BIT):
                continue  # what is offloaded is stepped in 32 bits
            expert_sizes = _expert_sizes(request, data * context * tensor)
            for expert, backend, compression, mode in itertools.product(
                expert_sizes, request.backends, request.compressions, ("none", "selective", "full")
            ):
                plain = at_home and tensor * pipeline * context * expert == 1
                if not _goes_together(request, stage, backend, compression, data * context, plain):
                    continue
                strategy = Strategy(
                    zero_stage=stage,
                    optimizer_home=optimizer_home,
                    params_home=params_home,
                    activation_checkpointing=mode,
                    micro_size=1,
                    accumulation=1,
                    tensor_parallel=tensor,
                    pipeline_parallel=pipeline,
                    data_parallel=data,
                    dtype=request.dtype,
                    reduce_dtype=request.reduce_dtype,
                    optimizer=request.optimizer,
                    context_parallel=context,
                    expert_parallel=expert,
                    compression=compression,
                    backend=backend,
                )
                yield strategy
                if size := _group_in_a_node(request, strategy):
                    yield replace(strategy, shard_size=size)


def _group_in_a_node(request: Request, strategy: Strategy) -> int:
    """Return how many data-parallel ranks of a node could share a copy of the states; 0 where there is no such group.

    What the network between nodes then carries is a share of the gradients alone.
    """
    data, experts = strategy.data_parallel, strategy.expert_parallel
    cut = strategy.tensor_parallel * strategy.context_parallel
    size = request.ranks_per_node // cut
    shares = strategy.backend == "native" and strategy.zero_stage >= 1 and size * strategy.context_parallel > 1
    if not shares or not 0 < size < data or data % size or size * cut % experts:
        return 0
    return size


def _goes_together(request: Request, stage: int, backend: str, compression: str, num_shards: int, plain: bool) -> bool:
    """Tell whether the backend has the stage, and the compression somebody to send to and the right optimizer."""
    if stage not in BACKENDS[backend] or (backend != "native" and not (plain and compression == "none")):
        return False
    if backend != "native" and request.optimizer.endswith(EIGHT_BIT):
        return False
    if backend == "ddp" and request.dtype != "fp32" and request.reduce_dtype == "same":
        return False
    if compression == "none":
        return True
    # 1-bit Adam needs the whole momentum on every rank, and the variance of Adam.
    onebit = stage == 0 and request.optimizer in ("adam", "adamw")
    return plain and num_shards > 1 and (compression != "onebit" or onebit)


def _expert_sizes(request: Request, ranks: int) -> list[int]:
    """Return the sizes of expert parallelism: inside the `ranks` of a stage, whole experts on each."""
    experts = request.model.num_experts
    if experts == 1 or request.hardware.device_kind == "cpu":
        return [1]
    return [size for size in (1 << power for power in range(8)) if experts % size == 0 and ranks % size == 0]


def _model_parallel(request: Request) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor, pipeline, context) sizes.

    Tensor within a node and dividing the heads, a layer a stage at least, sequences cut into equal pieces of
    MIN_CONTEXT_TOKENS at least, and for each context rank as many of the heads that a tensor rank has.
    """
    model, world = request.model, request.world_size
    sizes = [1 << power for power in range(8)]
    contexts = [
        size
        for size in sizes
        if size == 1 or (model.sequence_length % size == 0 and model.sequence_length // size >= MIN_CONTEXT_TOKENS)
    ]
    for tensor, pipeline, context in itertools.product(sizes, sizes, contexts):
        cut = tensor * pipeline * context
        if tensor > request.ranks_per_node or world % cut or pipeline > model.num_layers:
            continue
        if model.num_heads % tensor or (model.num_kv_heads % tensor and tensor % model.num_kv_heads):
            continue
        heads, shared = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
        if heads % context or (shared % context and context % shared):
            continue
        # Ranks of a CPU host gain nothing from cutting the model.
        if cut > 1 and request.hardware.device_kind == "cpu":
            continue
        yield tensor, pipeline, context


def _placements(hardware: Hardware, data: int, pipeline: int) -> Iterator[tuple[int, str, str]]:
    """Yield (stage, home of the optimizer, home of the parameters)."""
    # A pipeline runs many micro-batches a step, and stages 2 and 3 would reduce and gather for each.
    stages: Iterable[int] = (0,) if data == 1 else (0, 1) if pipeline > 1 else (0, 1, 2, 3)
    for stage in stages:
        yield stage, "none", "none"
    # Host memory is the device memory of a CPU rank: only NVMe is another place.
    homes = ["cpu"] if hardware.device_kind == "cuda" else []
    if hardware.source == "named" or any(disk.is_nvme is not False for disk in hardware.disks):
        homes.append("nvme")
    for home in homes:
        # One rank alone shards nothing, but from stage 2 on its gradients leave the device as well.
        for stage in (1,) if pipeline > 1 else (1, 2, 3) if data > 1 else (1, 2):
            yield stage, home, "none"
        if pipeline == 1:
            yield 3, home, home
    if "cpu" in homes and "nvme" in homes and pipeline == 1:
        yield 3, "nvme", "cpu"


def micro_sizes(request: Request, strategy: Strategy) -> list[tuple[int, int]]:
    """Return the (micro_size, accumulation) to try, smallest first; empty where the global batch cannot be so divided.

    A pipeline's step has a micro-batch for each stage at least.
    """
    data, fixed = strategy.data_parallel, request.micro_size
    cap = max(1, MAX_MICRO_TOKENS * strategy.context_parallel // request.model.sequence_length)
    if request.global_size is None:
        accumulation = 4 * strategy.pipeline_parallel if strategy.pipeline_parallel > 1 else 1
        sizes = [fixed] if fixed else [size for size in MICRO_SIZES if size <= cap]
        return [(size, accumulation) for size in sizes]
    if request.global_size % data:
        return []
    share, stages = request.global_size // data, strategy.pipeline_parallel
    if fixed:
        return [(fixed, share // fixed)] if share % fixed == 0 and share // fixed >= stages else []
    return [(size, share // size) for size in MICRO_SIZES if share % size == 0 and size <= min(cap, share // stages)]


def best_micro(request: Request, strategy: Strategy, rates: Rates) -> Plan:
    """Return the plan of `strategy` with the fastest micro-batch that fits, else with the smallest."""
    sizes = micro_sizes(request, strategy)
    if not sizes:
        micro = request.micro_size or 1
        strategy = replace(strategy, micro_size=micro)
        return make_plan(
            request, strategy, footprint(request.model, strategy, rates.device_kind, rates.baseline_bytes), None
        )
    best: tuple[Strategy, Footprint, Timing] | None = None
    best_speed = 0.0
    for micro, accumulation in sizes:
        candidate = replace(strategy, micro_size=micro, accumulation=accumulation)
        memory = footprint(request.model, candidate, rates.device_kind, rates.baseline_bytes)
        if best is not None and not fits_in(request, candidate, memory):
            break
        timing = step_time(request.model, candidate, rates)
        total = timing.total_s
        # Where the speed is not known, matrices of some thousand tokens are taken to be large enough.
        tokens = min(micro * request.model.sequence_length, ENOUGH_MICRO_TOKENS)
        speed = micro * accumulation / total if total else float(tokens)
        # A larger micro-batch must earn its memory with 1% of speed.
        if best is None or speed > 1.01 * best_speed:
            best, best_speed = (candidate, memory, timing), speed
    assert best is not None
    return make_plan(request, *best)


def make_plan(request: Request, strategy: Strategy, memory: Footprint, timing: Timing | None) -> Plan:
    """Return the plan with its sentence. `timing` None says that the global batch cannot be divided."""
    problems = misfits(request, strategy, memory)
    data = strategy.data_parallel
    if timing is None:
        micro, stages = request.micro_size or 1, strategy.pipeline_parallel
        per_step = data * micro
        whole = request.global_size is not None and request.global_size % per_step == 0
        problems.append(
            f"global_size={request.global_size} gives {(request.global_size or 0) // per_step} micro-batches a step "
            f"({data} data-parallel ranks x micro_size {micro}), and a pipeline needs {stages}, one a stage"
            if whole
            else f"global_size={request.global_size} is not a multiple of {per_step} "
            f"({data} data-parallel ranks x micro_size {micro})"
        )
    limit, available = request.limit_bytes, is_available(strategy)
    unknown_limit = limit is None
    fits = not problems and not unknown_limit
    step_s = timing.total_s if timing else None
    global_size = strategy.micro_size * strategy.accumulation * data
    tokens_per_s = global_size * request.model.sequence_length / step_s if step_s else None
    ranks = request.ranks_per_node
    too_large = limit is not None and memory.total > limit * (1 - request.margin)
    change = smallest_change(request, strategy) if too_large and timing else ""
    return Plan(
        name=strategy_name(strategy) + request.name_suffix,
        backend=strategy.backend,
        zero_stage=strategy.zero_stage,
        offload=offload_word(strategy),
        tensor_parallel=strategy.tensor_parallel,
        pipeline_parallel=strategy.pipeline_parallel,
        activation_checkpointing=strategy.activation_checkpointing,
        micro_size=strategy.micro_size,
        accumulation=strategy.accumulation,
        precision=strategy.dtype,
        fits=fits,
        memory_per_rank_bytes=memory.total,
        memory=memory.by_category(),
        memory_limit_bytes=limit,
        host_memory_bytes=memory.host * ranks,
        nvme_bytes=memory.nvme * ranks,
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        why=why(request, strategy, memory, timing, problems, available, change),
        available=available,
        world_size=strategy.world_size,
        global_size=global_size,
        reduce_dtype=strategy.reduce_dtype,
        optimizer=strategy.optimizer,
        context_parallel=strategy.context_parallel,
        expert_parallel=strategy.expert_parallel,
        compression=strategy.compression,
        shard_size=strategy.shard_size,
        smallest_change=change,
    )


def _rank(plan: Plan, goal: Goal) -> tuple[float, ...]:
    """Return the sort key: what fits, then what can run, then the goal."""
    order = {"none": 0.0, "selective": 1.0, "full": 2.0}[plan.activation_checkpointing]
    # Without rates: less recomputation first, then less communication, both of which cost time on any machine.
    unknown = (float(plan.offload != "none"), order, float(plan.zero_stage))
    speed = plan.tokens_per_s
    known = (0.0, -speed) if speed is not None else (1.0, 0.0)
    if goal == "memory":
        key: tuple[float, ...] = (float(plan.memory_per_rank_bytes), *known)
    elif goal == "cost":
        key = (known[0], known[1] / plan.world_size, *unknown)
    else:
        key = (*known, *unknown)
    misfit = 0.0 if plan.fits else plan.memory_per_rank_bytes / (plan.memory_limit_bytes or 1)
    return (float(not plan.fits), misfit, *key, float(not plan.available))
