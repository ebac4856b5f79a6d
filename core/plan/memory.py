"""Device memory of one rank, term by term: model states, transient buffers of the engine, activations. Torch-free.

Legend: P parameters of one rank's part of the model, N data-parallel ranks, B parameters of the largest unit, R of the
root units, s sequence length, b micro-batch, h hidden size, i intermediate size, c bytes of the compute format, g bytes
of a gradient, o bytes of optimizer state. Units: bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from distui.core.axes.schedules import Course, course, tables
from distui.core.plan.types import GIB, ModelSpec

EIGHT_BIT = "_8bit"
"""Ends the name of an optimizer whose moments are kept in 8 bits (optimizer.state_bits)."""

OPTIMIZER_STATE_BYTES = {"adamw": 8.0, "adam": 8.0, "sgd": 0.0, "sgd_momentum": 4.0, "lion": 4.0, "adafactor": 0.0}
OPTIMIZER_STATE_BYTES |= {"muon": 4.0, f"adamw{EIGHT_BIT}": 2 + 8 / 256, f"adam{EIGHT_BIT}": 2 + 8 / 256}
"""Bytes of the moments a parameter, in fp32; in 8 bits with a scale for 256 elements each (arXiv 2110.02861).
Adafactor's are rows plus columns of a matrix: below 0.1% of it, counted as 0."""

SMALL_UNIT_PARAMETERS = 1 << 21
"""The engine joins neighbouring blocks up to this size into one unit (core/sharding/units/partition.py)."""

CUDA_CONTEXT_BYTES = GIB // 2
"""Driver context and libraries: what torch's out-of-memory messages show beyond what PyTorch allocated (0.5 GiB)."""

NCCL_BYTES = 3 * GIB // 10
"""Channels and buffers of one communicator or two; an assumption, in the range of 0.2-0.5 GiB seen on 8 GPUs."""

CPU_PROCESS_BYTES = 440 << 20
"""Peak resident set of a rank with torch 2.13 on CPUs beyond its tensors: 407 MiB measured where the model is next to
nothing, about 440 MiB with the math library's workspaces for hidden sizes of 256 and more (plan_accuracy.py)."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One point of the search: who holds what, where, in which format, in which portions."""

    zero_stage: int
    optimizer_home: str
    params_home: str
    activation_checkpointing: str
    micro_size: int
    accumulation: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    dtype: str
    reduce_dtype: str
    optimizer: str
    context_parallel: int = 1
    expert_parallel: int = 1
    compression: str = "none"
    backend: str = "native"
    pipeline_schedule: str = "1f1b"
    pipeline_chunks: int = 2
    shard_size: int = 0
    """Data-parallel ranks that hold one copy of the states; 0 is all of them."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks cut the hidden state outside of attention and feed-forward too."""
    mlp_tile: int = 0
    """Tokens that a feed-forward computes at a time; 0 is all."""
    loss_tile: int = 0

    @property
    def world_size(self) -> int:
        """All ranks; expert parallelism lives inside those of a pipeline's stage."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the states: all that average gradients, or a group of them."""
        return (self.shard_size or self.data_parallel) * self.context_parallel

    @property
    def num_replicas(self) -> int:
        """Copies of the states among the ranks that average gradients."""
        return self.data_parallel // self.shard_size if self.shard_size else 1


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank by category, and what it keeps elsewhere."""

    parameters: int
    gradients: int
    optimizer_states: int
    buffers: int
    activations: int
    logits: int
    framework: int
    host: int = 0
    nvme: int = 0

    @property
    def model_states(self) -> int:
        """Parameters, gradients and optimizer states on the device."""
        return self.parameters + self.gradients + self.optimizer_states

    @property
    def total(self) -> int:
        """All of the device."""
        return self.model_states + self.buffers + self.activations + self.logits + self.framework

    def by_category(self) -> dict[str, int]:
        """Return the device's bytes by category; they add up to `total`."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer_states": self.optimizer_states,
            "buffers": self.buffers,
            "activations": self.activations,
            "logits": self.logits,
            "framework": self.framework,
        }


def bytes_per_parameter(dtype: str, reduce_dtype: str, optimizer: str) -> tuple[int, int, float]:
    """Return c, g, o: bytes of a parameter, of its gradient, of its optimizer state with the master copy.

    Source: ZeRO, arXiv 1910.02054, section 3.1 (2 + 2 + 12 for Adam in mixed precision; here g is 4 when gradients are
    summed in fp32, the default).
    """
    compute = 4 if dtype == "fp32" else 2
    gradient = 4 if reduce_dtype == "fp32" else compute
    master = 0 if compute == 4 else 4
    return compute, gradient, OPTIMIZER_STATE_BYTES[optimizer] + master


def local_parameters(
    model: ModelSpec, tensor_parallel: int, pipeline_parallel: int, expert_parallel: int = 1
) -> tuple[float, float, float]:
    """Return P, B, R of the rank that holds most: experts are over EP where that is more than 1, the rest over TP."""
    root, layers = model.root_parameters, model.num_layers
    experts, over = model.expert_parameters / layers, expert_parallel if expert_parallel > 1 else tensor_parallel
    block = (model.block_parameters - experts) / tensor_parallel + experts / over
    if 0 < model.num_kv_heads < tensor_parallel:  # a rank has one head of keys and of values, which others have too
        head = model.head_size or model.hidden_size // model.num_heads
        block += 2 * model.hidden_size * head * (1 - model.num_kv_heads / tensor_parallel)
    if pipeline_parallel > 1:
        layers = -(-layers // pipeline_parallel)
        # The first stage has the embeddings, the last one the output projection; tied ones are held by both.
        head = model.head_parameters or root
        root = max(model.embedding_parameters or head, head) + model.hidden_size
    unit = max(block, (model.largest_block_parameters - experts) / tensor_parallel + experts / over)
    if block < SMALL_UNIT_PARAMETERS:
        unit = block * min(layers, max(1, int(SMALL_UNIT_PARAMETERS // max(1, block))))
    own_root = root / tensor_parallel
    return layers * block + own_root, unit, own_root


def shard_parameters(model: ModelSpec, strategy: Strategy) -> float:
    """Return S, the part of a rank's parameters whose states are its own where states are shared.

    An expert's are shared among the N x TP / EP ranks that hold it: the same share of all experts as of the rest.
    """
    experts = strategy.expert_parallel if strategy.num_shards == 1 else 1
    return (
        local_parameters(model, strategy.tensor_parallel, strategy.pipeline_parallel, experts)[0] / strategy.num_shards
    )


def activation_elements(model: ModelSpec) -> int:
    """Return what autograd keeps of one layer, in elements a token.

    Input and output of both norms (4h), q, k, v and the attention's output (flash attention keeps no scores), and the
    feed-forward's tensors: 2i for an activation between two matrices, 4i for a gated one, once an expert. GPT-2 shapes
    give 16h, 32 bytes in 16-bit formats, as measured to 0.3%. Source: arXiv 2205.05198, section 4, without dropout.
    """
    if model.measured_activation_elements:
        return math.ceil(model.measured_activation_elements)
    head = model.head_size or model.hidden_size // model.num_heads
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * head
    experts = model.experts_per_token
    mlp = _inside_feed_forward(model)
    routed = model.hidden_size * experts if model.num_experts > 1 else 0
    return 4 * model.hidden_size + attention + mlp + routed


def _inside_feed_forward(model: ModelSpec) -> int:
    inner = model.intermediate_size * model.experts_per_token + model.shared_intermediate_size
    return (4 if model.gated_mlp else 2) * inner


def footprint(model: ModelSpec, strategy: Strategy, device_kind: str, baseline_bytes: int | None = None) -> Footprint:
    """Return the memory of one rank at the peak of a step (the start of backward).

    `baseline_bytes`: of a CPU rank beyond its tensors, where a calibration measured it.
    """
    c, g, o = bytes_per_parameter(strategy.dtype, strategy.reduce_dtype, strategy.optimizer)
    tensor, pipeline = strategy.tensor_parallel, strategy.pipeline_parallel
    P, B, R = local_parameters(model, tensor, pipeline, strategy.expert_parallel)
    stage = strategy.zero_stage
    S = shard_parameters(model, strategy)
    host = nvme = 0.0
    if strategy.backend == "native":
        parameters = c * (S if stage >= 3 else P)
        gradients = g * (S if stage >= 2 else P)
        states = o * (S if stage >= 1 else P)
        buffers = transient_buffers(strategy, c, g, o, B, R, model.num_layers, device_kind)
        buffers += compression_buffers(strategy, g, P, B, R)
    else:
        parameters, gradients, states, buffers = peer_states(strategy, P, S, B, R)
    if strategy.optimizer_home != "none":
        if stage >= 2:  # reduced gradients leave for the optimizer's home
            states, gradients = states + gradients, 0.0
        host, nvme = (host + states, nvme) if strategy.optimizer_home == "cpu" else (host, nvme + states)
        states = 0.0
    if strategy.params_home != "none":
        host, nvme = (host + parameters, nvme) if strategy.params_home == "cpu" else (host, nvme + parameters)
        parameters = 0.0
    activations, logits = activation_bytes(model, strategy, c)
    if device_kind == "cuda":
        framework = CUDA_CONTEXT_BYTES + (NCCL_BYTES if strategy.world_size > 1 else 0)
    else:
        framework = baseline_bytes or CPU_PROCESS_BYTES
    return Footprint(
        parameters=math.ceil(parameters),
        gradients=math.ceil(gradients),
        optimizer_states=math.ceil(states),
        buffers=math.ceil(buffers),
        activations=math.ceil(activations),
        logits=math.ceil(logits),
        framework=framework,
        host=math.ceil(host),
        nvme=math.ceil(nvme),
    )


def transient_buffers(
    strategy: Strategy, c: int, g: int, o: float, B: float, R: float, num_layers: int, device_kind: str
) -> float:
    """Return what the engine allocates beyond the model states.

    In core/sharding: residence.py, units/pool.py, transport/transport.py.

    Stage 3: parameters of two units (2cB) and the root's (cR). Stages 2 and 3: full gradients of two units in flight
    (2gB) and of the root (gR). On gloo, reduce-scatter receives each peer's part: (N-1)/N of two units and the root.
    States of an optimizer on NVMe stream through three units: one fetched, one updated, one stored.
    """
    N, stage = strategy.num_shards, strategy.zero_stage
    in_flight = min(2, num_layers) * B + R
    bytes_ = 0.0
    if stage >= 3 and (N > 1 or strategy.params_home != "none"):
        bytes_ += c * in_flight
    if stage >= 2 and (N > 1 or strategy.optimizer_home != "none"):
        bytes_ += g * in_flight
    if N > 1 and stage >= 1 and device_kind == "cpu":
        bytes_ += g * in_flight * (N - 1) / N
    if strategy.optimizer_home != "none":
        at_home = g if stage >= 2 else 0
        if device_kind == "cuda":  # the update runs on the host: a gradient on its way down, parameters on theirs up
            bytes_ += 2 * (at_home + c) * max(B, R) / N
        else:
            bytes_ += 3 * (o + at_home) * max(B, R) / N
    return bytes_


def wire_bytes(compression: str, g: float) -> float:
    """Return the bytes that an element of a gradient takes between ranks.

    One bit and a fp32 scale for 1,024 elements (1-bit Adam, arXiv 2102.02888), or 8 bits and a scale for 256 (ZeRO++,
    arXiv 2306.10209, section 3.3).
    """
    return {"none": g, "onebit": 1 / 8 + 4 / 1024, "int8": 1 + 4 / 256, "fp8": 1 + 4 / 256}[compression]


def compression_buffers(strategy: Strategy, g: float, P: float, B: float, R: float) -> float:
    """Return what compressed gradients need: messages of two units and the root, out and in; one bit keeps error too.

    1-bit Adam keeps the frozen variance's divisor and the worker's error in fp32 for all P, the server's for P/N.
    """
    if strategy.compression == "none" or strategy.num_shards == 1:
        return 0.0
    messages = 2 * wire_bytes(strategy.compression, g) * (2 * B + R)
    return messages + (8 * P + 4 * P / strategy.num_shards if strategy.compression == "onebit" else 0.0)


DEEPSPEED_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size, allgather_bucket_size by default (its config documentation)."""


def peer_states(strategy: Strategy, P: float, S: float, B: float, R: float) -> tuple[float, float, float, float]:
    """Return parameters, gradients, optimizer states and buffers under the backends ddp, fsdp2 and deepspeed.

    ddp: fp32 throughout, gradients are views of its buckets; autocast keeps 16-bit copies of weights in forward.
    fsdp2: fp32 shards; all-gather and reduce-scatter copy, so a unit is there twice, and stage 2 keeps all parameters
    whole between forward and backward (torch.distributed.fsdp). deepspeed: a master copy even in fp32, and a bucket
    to reduce and one to gather (deepspeed/runtime/zero).
    """
    moments = OPTIMIZER_STATE_BYTES[strategy.optimizer]
    c = 4 if strategy.dtype == "fp32" else 2
    g = 4 if strategy.reduce_dtype == "fp32" else c
    stage, several = strategy.zero_stage, strategy.num_shards > 1
    if strategy.backend == "ddp":
        return 4 * P, 4 * P, moments * P, 2 * P if c == 2 else 0.0
    if strategy.backend == "fsdp2":
        copies = 2 * (c + g) * (2 * B + R) if several else 0.0
        return 4 * S, 4 * S, moments * S, copies + (c * P if stage < 3 else 0.0)
    bucket = min(DEEPSPEED_BUCKET, P)
    parameters = c * (S if stage >= 3 else P)
    gradients = c * (S if stage >= 2 else P)
    states = (moments + 4) * (S if stage >= 1 else P)
    return parameters, gradients, states, 2 * c * bucket if several and stage else 0.0


@lru_cache(maxsize=256)
def _course(schedule: str, ranks: int, micro: int, chunks: int, backward: float) -> Course:
    return course(schedule, tables(schedule, ranks, micro, chunks), backward=backward)


def pipeline_course(strategy: Strategy, recomputed: float = 0.0) -> Course:
    """Return what a pass of the strategy's schedule takes, in forwards of a rank's blocks.

    `recomputed` is the share of them that backward computes again. 1F1B is counted without its table: arXiv 2104.04473,
    section 2.2.
    """
    ranks, micro = strategy.pipeline_parallel, strategy.accumulation
    if strategy.pipeline_schedule == "interleaved":
        micro += -micro % ranks  # whole rounds
    if strategy.pipeline_schedule != "1f1b":
        return _course(strategy.pipeline_schedule, ranks, micro, strategy.pipeline_chunks, 2.0 + recomputed)
    end = (micro + ranks - 1) * (3.0 + recomputed)
    return Course(end, (ranks - 1) / (micro + ranks - 1), min(micro, ranks), ())


def activation_bytes(model: ModelSpec, strategy: Strategy, c: int) -> tuple[float, float]:
    """Return the bytes of stored activations (with the working set of backward) and of the logits.

    With full checkpointing a layer keeps its input (h) and one layer at a time is computed again; selective does so
    for every second layer. Logits: the logits, their log-softmax, and the gradient, 3cV a token (arXiv 2205.05198 has
    2..6 bytes a token and entry). Over TP ranks what lies inside attention and feed-forward, and the logits, are cut; a
    layer's input and the ends of both norms (4h) are whole on every rank (arXiv 2205.05198, eq. 2); cut along the
    sequence, what attention and feed-forward are given (2h) still is, for it is kept joined. In tiles (arXiv
    2506.13996) a feed-forward keeps nothing inside, and has one tile at a time, as the logits have.
    """
    tokens = strategy.micro_size * model.sequence_length / strategy.context_parallel
    tensor, pipeline = strategy.tensor_parallel, strategy.pipeline_parallel
    layers = -(-model.num_layers // pipeline)
    h = model.hidden_size
    elements = activation_elements(model)
    mlp_tokens, loss_tokens = (min(tokens, tile or tokens) for tile in (strategy.mlp_tile, strategy.loss_tile))
    if mlp_tokens < tokens and model.num_experts == 1:
        elements = max(4 * model.hidden_size, elements - _inside_feed_forward(model))
    whole = min(elements, 2 * h if strategy.sequence_parallel else 4 * h)
    layer = c * tokens * (whole + (elements - whole) / tensor)
    kept_input = c * tokens * h / (tensor if strategy.sequence_parallel else 1)
    if strategy.activation_checkpointing == "full":
        stored = layers * kept_input + layer
    elif strategy.activation_checkpointing == "selective":
        again = -(-layers // 2)  # the engine recomputes the first block, and every second one after it
        stored = (layers - again) * layer + again * kept_input + layer
    else:
        stored = layers * layer
    ends = 3 * c * tokens * h  # the embeddings' output, the last norm's input and output
    logits = 3 * c * loss_tokens * model.vocab_size / tensor
    widest = 2 * (model.intermediate_size * model.experts_per_token + model.shared_intermediate_size)
    working = c * (mlp_tokens * widest / tensor + tokens * 2 * h)
    if pipeline > 1:
        # One forward, one backward: the first stage keeps the most micro-batches, the last one has the logits.
        first = pipeline_course(strategy).peak * stored + working
        last = stored + ends + max(logits, logits / 3 + working)
        return (first, 0.0) if first >= last else (last - logits, logits)
    # Backward's own tensors come when two of the three logits tensors are gone.
    return stored + ends + max(0.0, working - 2 * logits / 3), logits
