"""What the planner takes and gives: a model's shapes, and a plan with every number's formula and source. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shapes of a transformer, enough to count its bytes and FLOPs."""

    name: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    sequence_length: int
    tied_embeddings: bool
    block_parameters: int
    """Parameters of a repeated block; their mean where the blocks differ."""
    largest_block_parameters: int = 0
    """Of the largest block, what a stage 3 rank gathers at a time; 0 where they are equal."""
    head_size: int = 0
    """Size of one attention head; 0 means hidden_size / num_heads."""
    gated_mlp: bool = True
    """Whether the feed-forward has a third matrix (SwiGLU)."""
    num_experts: int = 1
    experts_per_token: int = 1
    shared_intermediate_size: int = 0
    """Inner size of the feed-forward that every token passes beside its experts."""
    num_active_parameters: int = 0
    """Parameters that one token passes; 0 means all (not a mixture of experts)."""
    head_parameters: int = 0
    """Parameters of the output projection to the vocabulary (counted once when tied)."""
    embedding_parameters: int = 0
    """Parameters that are only looked up, not multiplied: token and position embeddings, unless tied to the head."""
    expert_parameters: int = 0
    """Parameters of all experts of all layers: what expert parallelism divides; 0 where there is no mixture."""
    measured_forward_flops: float = 0.0
    """FLOPs a token of a forward on the meta device; 0 where the shapes say."""
    measured_activation_elements: float = 0.0
    """Elements a token that autograd kept there, over the layers; 0 where the shapes say."""
    source: str = ""
    """Where the shapes come from: a preset, a config.json, a parameter count, a script."""

    @property
    def root_parameters(self) -> int:
        """Parameters outside the repeated blocks: embeddings, last norm, output projection."""
        return self.num_parameters - self.num_layers * self.block_parameters

    @property
    def forward_flops(self) -> float:
        """FLOPs of one token's forward: 2 a multiplied parameter, 4 l a d s of attention.

        Source: PaLM, arXiv 2204.02311, appendix B.
        """
        if self.measured_forward_flops:
            return self.measured_forward_flops
        multiplied = self.active_parameters - self.embedding_parameters
        return 2 * multiplied + self.attention_flops

    @property
    def attention_flops(self) -> float:
        """FLOPs of one token's forward between queries, keys and values."""
        head = self.head_size or self.hidden_size // self.num_heads
        return 4.0 * self.num_layers * self.num_heads * head * self.sequence_length

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes."""
        return self.num_active_parameters or self.num_parameters


@dataclass(frozen=True, slots=True)
class Term:
    """One number of an explanation: what it is, its value with unit, the formula, and where the formula is from."""

    name: str
    value: float
    unit: Literal["bytes", "s", "FLOP", "FLOP/s", "bytes/s", "tokens/s", "1"]
    formula: str
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to train the model on the hardware, with what it needs and how fast it goes.

    `offload` is one string: `none`, `optimizer:cpu`, `optimizer:nvme`, or both homes as `optimizer:cpu,params:cpu`.
    `tokens_per_s` and `step_s` are of the whole job and None where a rate that they need is not known.
    """

    name: str
    backend: str
    zero_stage: int
    offload: str
    tensor_parallel: int
    pipeline_parallel: int
    activation_checkpointing: str
    micro_size: int
    accumulation: int
    precision: str
    fits: bool
    memory_per_rank_bytes: int
    memory: Mapping[str, int]
    """Bytes by category; they add up to memory_per_rank_bytes: parameters, gradients, optimizer_states, buffers,
    activations, logits, framework."""
    memory_limit_bytes: int | None
    """What one rank has, before the margin; None where unknown."""
    host_memory_bytes: int
    """Per node, for offloaded states."""
    nvme_bytes: int
    """Per node, for states on NVMe."""
    step_s: float | None
    tokens_per_s: float | None
    why: str
    """One sentence with numbers: why it fits or not, why it cannot run yet, what is n/a. Never empty."""
    available: bool = True
    """Whether this version of distui can run it."""
    world_size: int = 1
    global_size: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    reduce_dtype: str = "fp32"
    optimizer: str = "adamw"
    compression: str = "none"
    shard_size: int = 0
    """Data-parallel ranks that hold one copy of the states; 0 is all of them."""
    terms: tuple[Term, ...] = field(default=())
    """Filled by `explain`, and for the plans that `plan_all` returns on request."""
    smallest_change: str = ""
    """For a plan that does not fit: the least that would make it fit; empty where nothing found does."""

    @property
    def data_parallel(self) -> int:
        """Ranks that hold different samples."""
        return max(1, self.world_size // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel))

    @property
    def offload_homes(self) -> dict[str, str]:
        """Homes by state, such as {"optimizer": "cpu", "params": "none"}."""
        homes = {"optimizer": "none", "params": "none"}
        if self.offload != "none":
            homes |= dict(part.split(":", 1) for part in self.offload.split(","))
        return homes

    def as_json(self) -> dict[str, Any]:
        """Return what `distui plan --json` prints for one plan: exactly the keys that other programs read."""
        keys = (
            "name backend zero_stage offload tensor_parallel pipeline_parallel activation_checkpointing micro_size "
            "fits memory_per_rank_bytes tokens_per_s why"
        )
        return {key: getattr(self, key) for key in keys.split()}

    def to_config(self) -> dict[str, dict[str, Any]]:
        """Return the config sections that make `distui launch` run this plan, as `Config` takes them."""
        return {
            "strategy": {
                "backend": self.backend,
                "zero_stage": self.zero_stage,
                "tensor_parallel": self.tensor_parallel,
                "pipeline_parallel": self.pipeline_parallel,
                "context_parallel": self.context_parallel,
                "expert_parallel": self.expert_parallel,
                "shard_size": self.shard_size,
            },
            "precision": {"dtype": self.precision, "reduce_dtype": self.reduce_dtype},
            "offload": dict(self.offload_homes),
            "activation_checkpointing": {"mode": self.activation_checkpointing},
            "batch": {"micro_size": self.micro_size, "accumulation": self.accumulation},
            "optimizer": {"name": self.optimizer.removesuffix("_8bit")}
            | ({"state_bits": 8} if self.optimizer.endswith("_8bit") else {}),
            "compression": {"gradients": self.compression},
        }
