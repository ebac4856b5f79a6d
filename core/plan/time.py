"""Time of one optimizer step: FLOPs at an achieved efficiency, communication by alpha and beta, overlap. Torch-free.

A rate that is not known makes the step's time unknown: `Rates.missing` says which one and how to measure it.
Units: seconds, bytes/s, FLOP/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distui.core.plan.homes import home_time
from distui.core.plan.memory import (
    OPTIMIZER_STATE_BYTES,
    Strategy,
    bytes_per_parameter,
    local_parameters,
    pipeline_course,
    shard_parameters,
    wire_bytes,
)
from distui.core.plan.rates import Rates, efficiency, link, missing_link
from distui.core.plan.types import ModelSpec

OVERLAP_SLOWDOWN = 0.189
"""Compute runs this much longer while communication runs beside it (arXiv 2507.03114, mean over A100, H100, MI250)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one optimizer step of one rank; `missing` lists the unknown rates (then total is None)."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    recompute_s: float = 0.0
    bubble_s: float = 0.0
    tensor_s: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0
    gradient_s: float = 0.0
    compression_s: float = 0.0
    backend_s: float = 0.0
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    overlap_s: float = 0.0
    optimizer_s: float = 0.0
    offload_s: float = 0.0
    efficiency: float = 0.0
    flops: float = 0.0
    gradient_bytes: float = 0.0
    parameter_bytes: float = 0.0
    missing: tuple[str, ...] = ()

    @property
    def total_s(self) -> float | None:
        """All that adds up to the step; hidden communication does not."""
        if self.missing:
            return None
        return (
            self.forward_s
            + self.backward_s
            + self.recompute_s
            + self.bubble_s
            + self.tensor_s
            + self.context_s
            + self.expert_s
            + self.gradient_s
            + self.compression_s
            + self.backend_s
            + self.exposed_s
            + self.overlap_s
            + self.optimizer_s
            + self.offload_s
        )


def _overlap(hideable_s: float, compute_s: float, device_kind: str) -> tuple[float, float]:
    """Return the exposed and the hidden part of communication beside `compute_s` of work."""
    if device_kind == "cpu":
        return hideable_s, 0.0  # ranks of a CPU host compute and copy with the same cores
    return max(0.0, hideable_s - compute_s), min(hideable_s, compute_s)


def step_time(model: ModelSpec, strategy: Strategy, rates: Rates) -> Timing:
    """Return the time of one optimizer step, term by term."""
    missing: list[str] = []
    c, g, o = bytes_per_parameter(strategy.dtype, strategy.reduce_dtype, strategy.optimizer)
    tensor, pipeline = strategy.tensor_parallel, strategy.pipeline_parallel
    P, _, R = local_parameters(model, tensor, pipeline, strategy.expert_parallel)
    S = shard_parameters(model, strategy)
    N, m, stage = strategy.num_shards, strategy.accumulation, strategy.zero_stage
    tokens = strategy.micro_size * model.sequence_length / strategy.context_parallel
    layers = -(-model.num_layers // pipeline)

    # Compute. 6 FLOPs a multiplied parameter and token, and 12 l h s of attention (arXiv 2204.02311, appendix B).
    rank_flops = model.forward_flops * tokens / (tensor * pipeline)
    # A matrix is cut along one of its dimensions. Of the source's rows h 6144 over 8 ranks reaches 44% too.
    achieved = efficiency(rates, model.hidden_size / math.sqrt(tensor))
    measured = rates.measured
    rate = measured.rate(strategy.dtype, model.hidden_size / tensor, tokens) if measured else None
    recomputed = {"none": 0.0, "selective": -(-layers // 2) / layers, "full": 1.0}[strategy.activation_checkpointing]
    if rate is not None:
        forward_s = rank_flops / rate
        achieved = rate / rates.peak_flops if rates.peak_flops else 0.0
    elif rates.peak_flops is None:
        how = "not measured: distui plan --calibrate" if rates.device_kind == "cpu" else "not in the table of GPUs"
        missing.append(f"compute rate in {strategy.dtype} ({how})")
        forward_s = 0.0
    else:
        forward_s = rank_flops / (rates.peak_flops * achieved)
    backward_s, recompute_s = 2 * forward_s, recomputed * forward_s
    idle = pipeline_course(strategy, recomputed).bubble
    bubble_s = m * (3 + recomputed) * forward_s * idle / (1.0 - idle)

    exposed_s = hidden_s = tensor_s = 0.0
    gradient_bytes, parameter_bytes = g * P, c * P
    units = layers + 2
    if N > 1:
        beta, alpha = link(rates, N, tensor)
        if beta is None:
            missing.append(missing_link(rates, N * tensor > rates.ranks_per_node))
        else:
            share = (N - 1) / N
            wire = gradient_bytes * wire_bytes(strategy.compression, g) / g
            reduce_s = _seconds(rates, N * tensor, "reduce_scatter", share * wire, units, alpha, beta)
            gather_s = _seconds(rates, N * tensor, "all_gather", share * parameter_bytes, units, alpha, beta)
            both_s = _seconds(rates, N * tensor, "all_reduce", share * wire, units, 2 * alpha, beta / 2)
            copies_s = _between_copies(strategy, rates, wire, units, missing)
            root = R / P
            first_backward_s = backward_s + recompute_s
            # (communication, work beside it, how often, the share that nothing can hide)
            passes = {
                0: [(both_s, first_backward_s, 1, root / 2)],
                1: [(reduce_s, first_backward_s, 1, root / 2), (gather_s, forward_s, 1, root / 2)],
                2: [(reduce_s, first_backward_s, m, root / 2), (gather_s, forward_s, 1, root / 2)],
                3: [(gather_s, forward_s, m, root / m), (reduce_s + gather_s, first_backward_s, m, root / 4)],
            }[stage]
            if copies_s:
                passes.append((copies_s, first_backward_s, 1, root / 2))
            for communication, work, times, open_share in passes:
                exposed, hidden = _overlap(communication * (1 - open_share), work, rates.device_kind)
                exposed_s += times * (exposed + communication * open_share)
                hidden_s += times * hidden
    if tensor > 1:
        beta, alpha = link(rates, tensor, 1)
        if beta is None:
            missing.append(missing_link(rates, tensor > rates.ranks_per_node))
        else:
            volume = 2 * (tensor - 1) / tensor * c * tokens * model.hidden_size / beta + 2 * alpha
            # Around attention and around the feed-forward; experts over ranks take half a sum, a gather, for one.
            sums = 2.0 if strategy.expert_parallel == 1 else 1.5 + (model.shared_intermediate_size > 0)
            tensor_s += m * layers * (2 + recomputed) * sums * volume
    if pipeline > 1:
        beta, alpha = link(rates, 2, max(1, strategy.world_size // pipeline))
        if beta is None:
            missing.append(missing_link(rates, True))
        else:
            tensor_s += 2 * m * (c * tokens * model.hidden_size / tensor / beta + alpha)

    context_s = _context(model, strategy, rates, tokens, layers, recomputed, missing)
    expert_s = _experts(model, strategy, rates, tokens, layers, recomputed, missing)

    stepped = S if stage >= 1 else P
    gradient_s = 0.0
    pass_bandwidth = (measured.pass_bandwidth if measured else None) or rates.memory_bandwidth
    if strategy.backend == "native" and pass_bandwidth is not None:
        # Autograd's fresh gradient is read and scaled into the unit's flat one, which later micro-batches add to.
        gradient_s = (m * c + (2 * m - 1) * g) * P / pass_bandwidth
    compression_s, backend_s = _copies(strategy, rates, c, g, P)
    # Master and moments are read and written, the gradient read, the 16-bit copy written: 28 bytes for fp32 AdamW.
    moved = 2 * (4 + OPTIMIZER_STATE_BYTES[strategy.optimizer]) + g + (c if c < 4 else 0)
    step_bandwidth = (measured.optimizer_bandwidth if measured else None) or rates.memory_bandwidth
    if step_bandwidth is None:
        missing.append("memory bandwidth (not measured: distui plan --calibrate)")
        optimizer_s = 0.0
    else:
        optimizer_s = moved * stepped / step_bandwidth
    homes = home_time(
        strategy,
        rates,
        moved=moved,
        bytes_each=(c, g, o),
        stepped=stepped,
        shard=S,
        forward_s=forward_s,
        recomputed=recomputed,
    )
    missing += homes.missing
    hidden_s += homes.hidden_s
    if homes.update_s is not None:
        optimizer_s = homes.update_s
    return Timing(
        forward_s=m * forward_s,
        backward_s=m * backward_s,
        recompute_s=m * recompute_s,
        bubble_s=bubble_s,
        tensor_s=tensor_s,
        context_s=m * context_s,
        expert_s=m * expert_s,
        gradient_s=gradient_s,
        compression_s=compression_s,
        backend_s=backend_s,
        exposed_s=exposed_s,
        hidden_s=hidden_s,
        overlap_s=OVERLAP_SLOWDOWN * hidden_s,
        optimizer_s=optimizer_s,
        offload_s=homes.offload_s,
        efficiency=achieved,
        flops=m * rank_flops * (3 + recomputed),
        gradient_bytes=gradient_bytes,
        parameter_bytes=parameter_bytes,
        missing=tuple(dict.fromkeys(missing)),
    )


def _seconds(rates: Rates, span: int, op: str, volume: float, units: int, alpha: float, beta: float) -> float:
    """Return the time of one pass over all units: measured alpha and beta inside a node, else those of the link.

    `volume` is what leaves a rank, (N-1)/N of the whole; an all-reduce sends it twice, which its own beta contains.
    """
    pair = rates.measured.collectives.get(op) if rates.measured and span <= rates.ranks_per_node else None
    alpha, beta = pair or (alpha, beta)
    return units * alpha + volume / beta


def _between_copies(strategy: Strategy, rates: Rates, wire: float, units: int, missing: list[str]) -> float:
    """Return seconds of summing each rank's share of the gradients over the copies of the states.

    An all-reduce of 1/N of a gradient over R ranks, N x TP apart. Source: MiCS, arXiv 2205.00119, section 3.4.
    """
    copies, span = strategy.num_replicas, strategy.num_shards * strategy.tensor_parallel
    if copies == 1:
        return 0.0
    beta, alpha = link(rates, copies, span)
    if beta is None:
        missing.append(missing_link(rates, copies * span > rates.ranks_per_node))
        return 0.0
    volume = (copies - 1) / copies * wire / strategy.num_shards
    return _seconds(rates, copies * span, "all_reduce", volume, units, 2 * alpha, beta / 2)


def _context(
    model: ModelSpec,
    strategy: Strategy,
    rates: Rates,
    tokens: float,
    layers: int,
    recomputed: float,
    missing: list[str],
) -> float:
    """Return seconds a micro-batch of exchanging pieces of sequences for heads around each layer's attention.

    Four all-to-alls a layer, of queries, keys, values and what attention gives, forward and backward; none is hidden.
    Heads of keys that are fewer than the ranks are sent to several. Source: Ulysses, arXiv 2309.14509, section 3.2.
    """
    ranks = strategy.context_parallel
    if ranks == 1:
        return 0.0
    beta, alpha = link(rates, ranks, strategy.tensor_parallel)
    if beta is None:
        missing.append(missing_link(rates, ranks * strategy.tensor_parallel > rates.ranks_per_node))
        return 0.0
    head = model.head_size or model.hidden_size // model.num_heads
    c = 4 if strategy.dtype == "fp32" else 2
    shared = max(model.num_kv_heads / strategy.tensor_parallel, ranks)
    volume = c * tokens * 2 * (model.num_heads / strategy.tensor_parallel + shared) * head * (ranks - 1) / ranks
    return layers * (2 + recomputed) * (volume / beta + 4 * alpha)


def _experts(
    model: ModelSpec,
    strategy: Strategy,
    rates: Rates,
    tokens: float,
    layers: int,
    recomputed: float,
    missing: list[str],
) -> float:
    """Return seconds a micro-batch of sending tokens to their experts and back, in forward and in backward.

    Two all-to-alls a layer and direction; nothing hides them. Tensor-parallel ranks, which have the same tokens, send a
    part of them each. Source: GShard, arXiv 2006.16668, section 3.2.
    """
    ranks = strategy.expert_parallel
    if ranks == 1:
        return 0.0
    beta, alpha = link(rates, ranks, 1)
    if beta is None:
        missing.append(missing_link(rates, ranks > rates.ranks_per_node))
        return 0.0
    c = 4 if strategy.dtype == "fp32" else 2
    volume = c * tokens / strategy.tensor_parallel * model.experts_per_token * model.hidden_size * (ranks - 1) / ranks
    return layers * (4 + 2 * recomputed) * (volume / beta + alpha)


def _copies(strategy: Strategy, rates: Rates, c: int, g: int, P: float) -> tuple[float, float]:
    """Return seconds of a step that compressing takes, and those that a backend copies more than native does."""
    bandwidth, m = rates.memory_bandwidth, strategy.accumulation
    if bandwidth is None and rates.measured is not None:
        bandwidth = rates.measured.optimizer_bandwidth
    if bandwidth is None or strategy.num_shards == 1:
        return 0.0, 0.0
    times = m if strategy.zero_stage >= 2 else 1
    compressed = 0.0
    if strategy.compression != "none":  # written and read on both sides of the wire
        compressed = times * 2 * P * (g + wire_bytes(strategy.compression, g)) / bandwidth
    cast = 6 * P * m if c == 2 else 0.0  # autocast reads fp32 weights and writes 16 bit, each forward
    moved = {
        "native": 0.0,
        "ddp": cast,
        # Copy-out of each gathered unit, copy-in of each gradient, read and written.
        "fsdp2": (2 * c * P * (2 if strategy.zero_stage >= 3 else 1) + 2 * g * P) * m,
        "deepspeed": (2 * g * P + (4 * c * P if strategy.zero_stage >= 3 else 0.0)) * times,
    }.get(strategy.backend, 0.0)
    return compressed, moved / bandwidth
