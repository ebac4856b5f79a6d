"""Time of one optimizer step: FLOPs at an achieved efficiency, communication by alpha and beta, overlap. Torch-free.

A rate that is not known makes the step's time unknown: `Rates.missing` says which one and how to measure it.
Units: seconds, bytes/s, FLOP/s.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from distui.core.hardware import Hardware
from distui.core.plan.memory import (
    OPTIMIZER_STATE_BYTES,
    Strategy,
    bytes_per_parameter,
    local_parameters,
    wire_bytes,
)
from distui.core.plan.types import ModelSpec

LINK_EFFICIENCY = 0.77
"""NCCL's achieved share of a link's datasheet rate: 230 of 300 GB/s for large messages on 8 A100 (nccl-tests)."""

OVERLAP_SLOWDOWN = 0.189
"""Compute runs this much longer while communication runs beside it (arXiv 2507.03114, mean over A100, H100, MI250)."""

NCCL_BASE_S = 8.4e-6
NVLINK_HOP_S, PCIE_HOP_S, NETWORK_HOP_S = 3.4e-6, 5.7e-6, 14e-6
"""Latency of a ring collective and of each hop, Simple protocol (NCCL, src/graph/tuning.cc)."""

CPU_EFFICIENCY = 0.5
"""Share of the measured matrix rate that a training step reaches on a CPU; an assumption."""

EFFICIENCY_BY_WIDTH = ((1024, 0.30), (2048, 0.40), (4096, 0.50))
"""Achieved share of the peak by hidden size (over tensor-parallel ranks), between these points linear in log2.
Source: Megatron-LM, arXiv 2104.04473, table 1: 44-52% on A100 from hidden size 2304 up; below that an assumption."""

HOPPER_FACTOR = 0.8
"""Faster units wait more for memory: Llama 3 reached 38-43% of the peak on H100 (arXiv 2407.21783, table 4)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the hardware does in a second, None where unknown."""

    device_kind: str
    ranks_per_node: int
    nodes: int
    peak_flops: float | None
    is_hopper_or_later: bool
    memory_bandwidth: float | None
    intra_bandwidth: float | None
    intra_hop_s: float
    intra_name: str
    node_bandwidth: float | None
    pcie_bandwidth: float | None
    nvme_read: float | None
    nvme_write: float | None


def rates_of(hardware: Hardware, dtype: str, ranks_per_node: int) -> Rates:
    """Return the rates of one rank of `hardware` that computes in `dtype`."""
    gpus = hardware.gpus_per_node
    nvme = next((disk for disk in hardware.disks if disk.read_rate and disk.write_rate), None)
    if gpus:
        nvlinks = [gpu.nvlink_bandwidth for gpu in gpus]
        links = [gpu.pcie_bandwidth for gpu in gpus]
        pcie = min(link for link in links if link) if all(links) else None
        nvlink = min(link for link in nvlinks if link) if all(nvlinks) else None
        memory = [gpu.memory_bandwidth for gpu in gpus]
        capability = min(gpu.compute_capability or (0, 0) for gpu in gpus)
        return Rates(
            device_kind="cuda",
            ranks_per_node=ranks_per_node,
            nodes=hardware.nodes,
            peak_flops=hardware.peak_flops(dtype),
            is_hopper_or_later=capability >= (9, 0) or capability == (0, 0),
            memory_bandwidth=min(rate for rate in memory if rate) if all(memory) else None,
            intra_bandwidth=nvlink or pcie,
            intra_hop_s=NVLINK_HOP_S if nvlink else PCIE_HOP_S,
            intra_name="NVLink" if nvlink else "PCIe",
            node_bandwidth=hardware.node_bandwidth,
            pcie_bandwidth=pcie,
            nvme_read=nvme.read_rate if nvme else None,
            nvme_write=nvme.write_rate if nvme else None,
        )
    cpu_memory = hardware.cpu.memory_bandwidth if hardware.cpu else None
    return Rates(
        device_kind="cpu",
        ranks_per_node=ranks_per_node,
        nodes=hardware.nodes,
        peak_flops=hardware.peak_flops(dtype, ranks_per_node),
        is_hopper_or_later=False,
        memory_bandwidth=cpu_memory / ranks_per_node if cpu_memory else None,
        intra_bandwidth=hardware.rank_bandwidth,
        intra_hop_s=0.0,
        intra_name="memory of the host",
        node_bandwidth=hardware.node_bandwidth,
        pcie_bandwidth=None,
        nvme_read=nvme.read_rate if nvme else None,
        nvme_write=nvme.write_rate if nvme else None,
    )


def efficiency(rates: Rates, width: float) -> float:
    """Return the achieved share of the peak for matrices of this width."""
    if rates.device_kind == "cpu":
        return CPU_EFFICIENCY
    points = EFFICIENCY_BY_WIDTH
    place = math.log2(max(1.0, width))
    found = points[-1][1]
    if width <= points[0][0]:
        found = max(0.05, points[0][1] + (place - math.log2(points[0][0])) * 0.1)
    else:
        for (low, low_value), (high, high_value) in itertools.pairwise(points):
            if low <= width <= high:
                share = (place - math.log2(low)) / (math.log2(high) - math.log2(low))
                found = low_value + share * (high_value - low_value)
                break
    return found * (HOPPER_FACTOR if rates.is_hopper_or_later else 1.0)


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
            + self.compression_s
            + self.backend_s
            + self.exposed_s
            + self.overlap_s
            + self.optimizer_s
            + self.offload_s
        )


def link(rates: Rates, group_size: int, span: int) -> tuple[float | None, float]:
    """Return beta (bytes/s) and alpha (s) of a ring over `group_size` ranks that take each `span`-th rank of the job.

    Ranks are placed node by node. A group that leaves its node shares the node's network with the other groups.
    """
    per_node = max(1, rates.ranks_per_node // span)
    if group_size <= per_node:
        beta = rates.intra_bandwidth * LINK_EFFICIENCY if rates.intra_bandwidth else None
        if rates.device_kind == "cpu":
            beta = rates.intra_bandwidth  # measured, so nothing is to be taken off
        return beta, NCCL_BASE_S + (group_size - 1) * rates.intra_hop_s
    nodes = -(-group_size // per_node)
    # NCCL crosses many nodes along trees (and PAT since 2.23), so hops grow with the logarithm.
    alpha = NCCL_BASE_S + (per_node - 1) * rates.intra_hop_s + math.ceil(math.log2(nodes)) * NETWORK_HOP_S
    if rates.node_bandwidth is None or (per_node > 1 and rates.intra_bandwidth is None):
        return None, alpha
    groups = min(span, rates.ranks_per_node)
    beta = rates.node_bandwidth * LINK_EFFICIENCY / groups
    if per_node > 1 and rates.intra_bandwidth is not None:
        beta = min(beta, rates.intra_bandwidth * LINK_EFFICIENCY)
    return beta, alpha


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
    S = local_parameters(model, tensor, pipeline)[0] / strategy.num_shards
    N, m, stage = strategy.num_shards, strategy.accumulation, strategy.zero_stage
    tokens = strategy.micro_size * model.sequence_length / strategy.context_parallel
    layers = -(-model.num_layers // pipeline)

    # Compute. 6 FLOPs a multiplied parameter and token, and 12 l h s of attention (arXiv 2204.02311, appendix B).
    rank_flops = model.forward_flops * tokens / (tensor * pipeline)
    achieved = efficiency(rates, model.hidden_size / tensor)
    recomputed = {"none": 0.0, "selective": -(-layers // 2) / layers, "full": 1.0}[strategy.activation_checkpointing]
    if rates.peak_flops is None:
        how = "not measured: distui doctor --measure" if rates.device_kind == "cpu" else "not in the table of GPUs"
        missing.append(f"compute rate in {strategy.dtype} ({how})")
        forward_s = 0.0
    else:
        forward_s = rank_flops / (rates.peak_flops * achieved)
    backward_s, recompute_s = 2 * forward_s, recomputed * forward_s
    bubble_s = (pipeline - 1) * (3 + recomputed) * forward_s  # 1F1B, arXiv 2104.04473, section 2.2

    exposed_s = hidden_s = tensor_s = offload_s = 0.0
    gradient_bytes, parameter_bytes = g * P, c * P
    units = layers + 2
    if N > 1:
        beta, alpha = link(rates, N, tensor)
        if beta is None:
            missing.append(_missing_link(rates, N * tensor > rates.ranks_per_node))
        else:
            share = (N - 1) / N
            wire = gradient_bytes * wire_bytes(strategy.compression, g) / g
            reduce_s = units * alpha + share * wire / beta
            gather_s = units * alpha + share * parameter_bytes / beta
            root = R / P
            first_backward_s = backward_s + recompute_s
            # (communication, work beside it, how often, the share that nothing can hide)
            passes = {
                0: [(2 * reduce_s, first_backward_s, 1, root / 2)],
                1: [(reduce_s, first_backward_s, 1, root / 2), (gather_s, forward_s, 1, root / 2)],
                2: [(reduce_s, first_backward_s, m, root / 2), (gather_s, forward_s, 1, root / 2)],
                3: [(gather_s, forward_s, m, root / m), (reduce_s + gather_s, first_backward_s, m, root / 4)],
            }[stage]
            for communication, work, times, open_share in passes:
                exposed, hidden = _overlap(communication * (1 - open_share), work, rates.device_kind)
                exposed_s += times * (exposed + communication * open_share)
                hidden_s += times * hidden
    if tensor > 1:
        beta, alpha = link(rates, tensor, 1)
        if beta is None:
            missing.append(_missing_link(rates, tensor > rates.ranks_per_node))
        else:
            volume = 2 * (tensor - 1) / tensor * c * tokens * model.hidden_size / beta + 2 * alpha
            tensor_s += m * layers * (4 + 2 * recomputed) * volume
    if pipeline > 1:
        beta, alpha = link(rates, 2, max(1, strategy.world_size // pipeline))
        if beta is None:
            missing.append(_missing_link(rates, True))
        else:
            tensor_s += 2 * m * (c * tokens * model.hidden_size / tensor / beta + alpha)

    context_s, context_hidden_s = _context(model, strategy, rates, tokens, layers, forward_s, recomputed, missing)
    hidden_s += m * context_hidden_s
    expert_s = _experts(model, strategy, rates, tokens, layers, recomputed, missing)

    stepped = S if stage >= 1 else P
    compression_s, backend_s = _copies(strategy, rates, c, g, P)
    if rates.memory_bandwidth is None:
        missing.append("memory bandwidth (not measured: distui doctor --measure)")
        optimizer_s = 0.0
    else:
        # Master and moments are read and written, the gradient read, the 16-bit copy written: 28 bytes for fp32 AdamW.
        moved = 2 * (4 + OPTIMIZER_STATE_BYTES[strategy.optimizer]) + g + (c if c < 4 else 0)
        optimizer_s = moved * stepped / rates.memory_bandwidth
    for home, volume, times in (
        (strategy.optimizer_home, o * stepped, 1),
        (strategy.params_home, c * S, 2 * m),
    ):
        if home == "none":
            continue
        one_way, back, name = _home_rates(home, rates)
        if one_way is None or back is None:
            missing.append(name)
        elif times > 1:
            exposed, hidden = _overlap(times * volume / one_way, m * (3 + recomputed) * forward_s, rates.device_kind)
            offload_s, hidden_s = offload_s + exposed, hidden_s + hidden
        else:
            offload_s += max(volume / one_way, volume / back)
    return Timing(
        forward_s=m * forward_s,
        backward_s=m * backward_s,
        recompute_s=m * recompute_s,
        bubble_s=bubble_s,
        tensor_s=tensor_s,
        context_s=m * context_s,
        expert_s=m * expert_s,
        compression_s=compression_s,
        backend_s=backend_s,
        exposed_s=exposed_s,
        hidden_s=hidden_s,
        overlap_s=OVERLAP_SLOWDOWN * hidden_s,
        optimizer_s=optimizer_s,
        offload_s=offload_s,
        efficiency=achieved,
        flops=m * rank_flops * (3 + recomputed),
        gradient_bytes=gradient_bytes,
        parameter_bytes=parameter_bytes,
        missing=tuple(dict.fromkeys(missing)),
    )


def _context(
    model: ModelSpec,
    strategy: Strategy,
    rates: Rates,
    tokens: float,
    layers: int,
    forward_s: float,
    recomputed: float,
    missing: list[str],
) -> tuple[float, float]:
    """Return exposed and hidden seconds a micro-batch of passing keys and values around the ring of a sequence's ranks.

    Each layer's forward passes K and V, its backward K, V and their gradients, each beside the attention that it feeds.
    Source: ring attention, arXiv 2310.01889.
    """
    ranks = strategy.context_parallel
    if ranks == 1:
        return 0.0, 0.0
    beta, alpha = link(rates, ranks, strategy.tensor_parallel)
    if beta is None:
        missing.append(_missing_link(rates, ranks * strategy.tensor_parallel > rates.ranks_per_node))
        return 0.0, 0.0
    head = model.head_size or model.hidden_size // model.num_heads
    c = 4 if strategy.dtype == "fp32" else 2
    volume = 2 * c * tokens * model.num_kv_heads * head / strategy.tensor_parallel
    passes = 3 + recomputed
    ring_s = layers * passes * (ranks - 1) * (volume / beta + alpha)
    attention_s = passes * forward_s * min(1.0, model.attention_flops / model.forward_flops)
    return _overlap(ring_s, attention_s, rates.device_kind)


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

    Two all-to-alls a layer and direction; nothing hides them. Source: GShard, arXiv 2006.16668, section 3.2.
    """
    ranks = strategy.expert_parallel
    if ranks == 1:
        return 0.0
    span = strategy.tensor_parallel * strategy.context_parallel
    beta, alpha = link(rates, ranks, span)
    if beta is None:
        missing.append(_missing_link(rates, ranks * span > rates.ranks_per_node))
        return 0.0
    c = 4 if strategy.dtype == "fp32" else 2
    volume = c * tokens * model.experts_per_token * model.hidden_size * (ranks - 1) / ranks
    return layers * (4 + 2 * recomputed) * (volume / beta + alpha)


def _copies(strategy: Strategy, rates: Rates, c: int, g: int, P: float) -> tuple[float, float]:
    """Return seconds of a step that compressing takes, and those that a backend copies more than native does."""
    bandwidth, m = rates.memory_bandwidth, strategy.accumulation
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


def _missing_link(rates: Rates, between_nodes: bool) -> str:
    if between_nodes and rates.node_bandwidth is None:
        return "bandwidth between nodes (give --network-gbits)"
    if rates.device_kind == "cpu":
        return "bandwidth between ranks (not measured: distui doctor --collectives)"
    return "bandwidth between GPUs (NVML does not tell)"


def _home_rates(home: str, rates: Rates) -> tuple[float | None, float | None, str]:
    """Return bytes/s from and to the home for one rank, and what to say where they are unknown."""
    if home == "cpu":
        rate = rates.pcie_bandwidth * LINK_EFFICIENCY if rates.pcie_bandwidth else None
        return rate, rate, "PCIe rate of the GPUs (NVML does not tell)"
    read = rates.nvme_read / rates.ranks_per_node if rates.nvme_read else None
    write = rates.nvme_write / rates.ranks_per_node if rates.nvme_write else None
    return read, write, "rate of the NVMe disk (not measured: distui doctor --disk PATH)"
