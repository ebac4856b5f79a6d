"""Every number of a plan with its formula and where the formula is from. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from distui.core.hardware.detect import Hardware
from distui.core.plan.memory import (
    Footprint,
    Strategy,
    activation_elements,
    bytes_per_parameter,
    footprint,
    local_parameters,
)
from distui.core.plan.rates import CPU_EFFICIENCY, HOPPER_FACTOR, LINK_EFFICIENCY, Rates, link, rates_of
from distui.core.plan.time import OVERLAP_SLOWDOWN, Timing, step_time
from distui.core.plan.types import ModelSpec, Plan, Term

ZERO = "ZeRO, arXiv 1910.02054, section 3 and 5"
ENGINE = "distui's engine: core/sharding/residence.py, units/pool.py, transport/transport.py"
ACTIVATIONS = "arXiv 2205.05198, section 4, without dropout and with flash attention; GPT-2 measured to 0.3%"
MEGATRON = "Megatron-LM, arXiv 2104.04473"


def explain(
    plan: Plan, model: ModelSpec, hardware: Hardware, *, sequence_length: int | None = None, nproc: int | None = None
) -> list[Term]:
    """Return every number of `plan` with its formula and source. Options as they were given to `plan_all`."""
    if sequence_length is not None:
        model = replace(model, sequence_length=sequence_length)
    ranks = nproc or max(1, plan.world_size // hardware.nodes)
    homes = plan.offload_homes
    strategy = Strategy(
        zero_stage=plan.zero_stage,
        optimizer_home=homes["optimizer"],
        params_home=homes["params"],
        activation_checkpointing=plan.activation_checkpointing,
        micro_size=plan.micro_size,
        accumulation=plan.accumulation,
        tensor_parallel=plan.tensor_parallel,
        pipeline_parallel=plan.pipeline_parallel,
        data_parallel=plan.data_parallel,
        dtype=plan.precision,
        reduce_dtype=plan.reduce_dtype,
        optimizer=plan.optimizer,
        context_parallel=plan.context_parallel,
        expert_parallel=plan.expert_parallel,
        compression=plan.compression,
        backend=plan.backend,
        shard_size=plan.shard_size,
    )
    rates = rates_of(hardware, plan.precision, ranks)
    memory = footprint(model, strategy, rates.device_kind, rates.baseline_bytes)
    return terms_of(model, strategy, hardware, rates, memory, step_time(model, strategy, rates))


def terms_of(
    model: ModelSpec, strategy: Strategy, hardware: Hardware, rates: Rates, memory: Footprint, timing: Timing
) -> list[Term]:
    """Return the terms of memory, then of time; a time term whose rate is unknown is left out."""
    return [
        *_memory(model, strategy, memory, rates),
        *_rates(model, strategy, hardware, rates, timing),
        *_time(timing, strategy),
    ]


def _memory(model: ModelSpec, strategy: Strategy, memory: Footprint, rates: Rates) -> list[Term]:
    c, g, o = bytes_per_parameter(strategy.dtype, strategy.reduce_dtype, strategy.optimizer)
    P, B, R = local_parameters(model, strategy.tensor_parallel, strategy.pipeline_parallel, strategy.expert_parallel)
    N, stage = strategy.num_shards, strategy.zero_stage

    def over(first_stage: int) -> str:
        return f" / N={N}" if stage >= first_stage else ""

    b, s, h = strategy.micro_size, model.sequence_length, model.hidden_size
    moved = "; its home is {}".format
    optimizer_home = moved(strategy.optimizer_home) if strategy.optimizer_home != "none" else ""
    gradient_home = optimizer_home if stage >= 2 else ""
    params_home = moved(strategy.params_home) if strategy.params_home != "none" else ""
    layer = {
        "none": "l x E",
        "selective": "(l - l/2) x E + l/2 x h + one layer computed again (E)",
        "full": "l x h + one layer computed again (E)",
    }[strategy.activation_checkpointing]
    elements = activation_elements(model)
    cut = f" / CP={strategy.context_parallel}" if strategy.context_parallel > 1 else ""
    if strategy.tensor_parallel > 1:
        whole = "2h" if strategy.sequence_parallel else "4h"
        layer = layer.replace("E", f"({whole} + (E - {whole}) / TP)", 1) + f", TP={strategy.tensor_parallel}"
        layer = layer.replace("l x h", "l x h / TP") if strategy.sequence_parallel else layer
    framework = (
        "driver context 0.5 GiB" + (", NCCL 0.3 GiB" if strategy.world_size > 1 else "")
        if rates.device_kind == "cuda"
        else f"a rank beyond its tensors, {memory.framework >> 20} MiB"
    )
    note = (
        "torch's out-of-memory messages; NCCL's part is an assumption"
        if rates.device_kind == "cuda"
        else (rates.measured.origin if rates.measured and rates.baseline_bytes else "measured on another machine")
    )
    terms = [
        Term("parameters of a rank's part (P)", P, "1", f"{model.source}; of TP x PP, experts EP x PP", "shapes"),
        Term("parameters", memory.parameters, "bytes", f"c={c} x P{over(3)}{params_home}", ZERO),
        Term("gradients", memory.gradients, "bytes", f"g={g} x P{over(2)}{gradient_home}", ZERO),
        Term("optimizer_states", memory.optimizer_states, "bytes", f"o={o:g} x P{over(1)}{optimizer_home}", ZERO),
        Term(
            "buffers",
            memory.buffers,
            "bytes",
            f"stage 3: c(2B + R); stage 2, 3: g(2B + R); gloo, stage 1 up: g(2B + R)(N-1)/N; optimizer elsewhere: "
            f"2(g + c) max(B, R)/N on a GPU, 3(o + g) max(B, R)/N on a CPU; with B={B:,.0f}, R={R:,.0f}",
            ENGINE,
        ),
        Term(
            "activations",
            memory.activations,
            "bytes",
            f"c x s={s} x b={b}{cut} x ({layer} + 3h + backward's own), l={model.num_layers}, E={elements}, h={h}",
            ACTIVATIONS,
        ),
        Term("logits", memory.logits, "bytes", _logits(model, strategy), "logits, log-softmax, gradient"),
        Term("framework", memory.framework, "bytes", framework, note),
        Term("memory of a rank", memory.total, "bytes", "sum of the seven", ""),
    ]
    if memory.host:
        terms.append(Term("host memory of a rank", memory.host, "bytes", "states whose home is cpu", ZERO))
    if memory.nvme:
        terms.append(Term("NVMe of a rank", memory.nvme, "bytes", "states whose home is nvme", ZERO))
    return terms


def _tokens(model: ModelSpec, strategy: Strategy) -> float:
    return strategy.micro_size * model.sequence_length / strategy.context_parallel


def _logits(model: ModelSpec, strategy: Strategy) -> str:
    over = f" / TP={strategy.tensor_parallel}" if strategy.tensor_parallel > 1 else ""
    tokens = f"{strategy.loss_tile} tokens at a time" if strategy.loss_tile else "s x b"
    return f"3c x {tokens} x V={model.vocab_size}{over}"


def _rates(model: ModelSpec, strategy: Strategy, hardware: Hardware, rates: Rates, timing: Timing) -> list[Term]:
    terms: list[Term] = []
    measured = "measured by distui doctor"
    if (kept := rates.measured) is not None:
        compute = kept.rate(strategy.dtype, model.hidden_size / strategy.tensor_parallel, _tokens(model, strategy))
        if compute is not None:
            formula = f"at h={model.hidden_size} and {_tokens(model, strategy):.0f} tokens"
            terms.append(Term("achieved compute rate", compute, "FLOP/s", formula, kept.origin))
        if kept.optimizer_bandwidth:
            terms.append(Term("optimizer's bandwidth", kept.optimizer_bandwidth, "bytes/s", "fused AdamW", kept.origin))
        if kept.pass_bandwidth:
            formula = "one tensor scaled into another"
            terms.append(Term("bandwidth of a pass", kept.pass_bandwidth, "bytes/s", formula, kept.origin))
        for op, (delay, rate) in kept.collectives.items():
            terms.append(Term(f"{op}: alpha", delay, "s", "small messages", kept.origin))
            terms.append(Term(f"{op}: beta", rate, "bytes/s", "large messages, (N-1)/N of the bytes", kept.origin))
        if hardware.nodes == 1:
            return terms
    source = hardware.gpus_per_node[0].facts_source if hardware.gpus_per_node else measured
    if rates.peak_flops is not None:
        terms.append(Term("peak of a rank", rates.peak_flops, "FLOP/s", f"dense {strategy.dtype}", source))
        formula = "by hidden size over the root of TP" + (
            f", x {HOPPER_FACTOR} from Hopper on" if rates.is_hopper_or_later else ""
        )
        origin = f"{MEGATRON}, table 1; Llama 3, arXiv 2407.21783, table 4"
        if rates.device_kind == "cpu":
            formula, origin = f"{CPU_EFFICIENCY} of the measured matrix rate", "assumption"
        terms.append(Term("achieved share of the peak", timing.efficiency, "1", formula, origin))
    if rates.memory_bandwidth is not None:
        terms.append(Term("memory bandwidth of a rank", rates.memory_bandwidth, "bytes/s", "", source))
    if rates.device_kind == "cuda" and strategy.optimizer_home != "none":
        formula = "of a node, shared by its ranks"
        terms.append(Term("host's update bandwidth", rates.host_bandwidth, "bytes/s", formula, rates.host_source))
    if strategy.num_shards > 1:
        beta, alpha = link(rates, strategy.num_shards, strategy.tensor_parallel)
        if beta is not None:
            crosses = strategy.num_shards * strategy.tensor_parallel > rates.ranks_per_node
            over = "network between nodes" if crosses else rates.intra_name
            origin = hardware.node_bandwidth_source if crosses else source
            formula = f"{over}, x {LINK_EFFICIENCY} achieved" if rates.device_kind == "cuda" else over
            terms.append(Term("data-parallel bandwidth", beta, "bytes/s", formula, origin))
            terms.append(Term("latency of a collective", alpha, "s", "base + hops", "NCCL, src/graph/tuning.cc"))
    return terms


def _time(timing: Timing, strategy: Strategy) -> list[Term]:
    if timing.missing:
        return []
    volume = {
        0: "all-reduce of gradients: 2 x gP(N-1)/N under the last backward",
        1: "reduce-scatter gP(N-1)/N under the last backward, all-gather cP(N-1)/N under the next forward",
        2: "reduce-scatter gP(N-1)/N under each backward, all-gather cP(N-1)/N under the next forward",
        3: "all-gather cP(N-1)/N under each forward and backward, reduce-scatter gP(N-1)/N under each backward",
    }[strategy.zero_stage]
    if strategy.num_replicas > 1:
        volume += f"; all-reduce of gP/N over {strategy.num_replicas} copies, 2 x gP/N(R-1)/R, under the last backward"
    peak = "FLOPs / (peak x share)"
    rows = [
        ("forward", timing.forward_s, f"(2 P + 4 l h s) tokens, {peak}", "PaLM, arXiv 2204.02311, appendix B"),
        ("backward", timing.backward_s, "2 x forward", "PaLM, arXiv 2204.02311, appendix B"),
        ("recomputation", timing.recompute_s, "checkpointed share x forward", "arXiv 2205.05198"),
        ("pipeline bubble", timing.bubble_s, "(PP - 1) x micro-batch", f"{MEGATRON}, section 2.2"),
        ("model-parallel communication", timing.tensor_s, "4 all-reduces a layer, sends between stages", MEGATRON),
        (
            "context-parallel communication",
            timing.context_s,
            "8 all-to-alls a layer of c x tokens x heads x (CP-1)/CP, of keys at least CP heads",
            "Ulysses, arXiv 2309.14509",
        ),
        (
            "expert-parallel communication",
            timing.expert_s,
            "4 all-to-alls a layer of c x tokens x k x h x (EP-1)/EP",
            "GShard, arXiv 2006.16668",
        ),
        (
            "gradients into flat buffers",
            timing.gradient_s,
            "cP read and gP written a micro-batch (later ones add) / memory bandwidth",
            ENGINE,
        ),
        ("compression", timing.compression_s, "gradients read and written on both sides / memory bandwidth", ENGINE),
        (
            "copies of the backend",
            timing.backend_s,
            f"{strategy.backend}: copies of units, gradients or casts / memory bandwidth",
            "torch.distributed.fsdp, DeepSpeed: their source",
        ),
        (
            "exposed communication",
            timing.exposed_s,
            f"{volume}; what outlasts it, and the root",
            ZERO,
        ),
        ("hidden communication", timing.hidden_s, "costs nothing but the next line", ZERO),
        ("slowdown by overlap", timing.overlap_s, f"{OVERLAP_SLOWDOWN} x hidden communication", "arXiv 2507.03114"),
        (
            "optimizer",
            timing.optimizer_s,
            "bytes read and written / memory bandwidth"
            + (", on the host" if strategy.optimizer_home != "none" else ""),
            "fused AdamW: 28 bytes in fp32",
        ),
        (
            "offload",
            timing.offload_s,
            "what link and disk take beyond the update on the host, and beyond the backward",
            "ZeRO-Infinity, arXiv 2104.07857; docs/offload.md",
        ),
    ]
    terms = [Term(name, value, "s", formula, source) for name, value, formula, source in rows if value]
    total = timing.total_s
    if total is not None:
        terms.append(Term("step", total, "s", "sum, hidden communication left out", ""))
        terms.append(Term("FLOPs of a rank", timing.flops, "FLOP", "with recomputation", ""))
    return terms
