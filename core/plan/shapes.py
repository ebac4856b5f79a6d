"""Count the parameters of transformers from their shapes. Torch-free."""

from __future__ import annotations

from typing import Any

from distui.core.plan.types import ModelSpec


def decoder(
    name: str,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    vocab_size: int,
    sequence_length: int,
    num_kv_heads: int | None = None,
    head_size: int | None = None,
    intermediate_size: int | None = None,
    num_positions: int = 0,
    tied_embeddings: bool = False,
    gated_mlp: bool = True,
    norm_weights: bool = True,
    layer_norm_bias: bool = False,
    norms_per_block: int = 2,
    final_norm: bool = True,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_bias: bool = False,
    qk_norm: int = 0,
    attention_parameters: int | None = None,
    block_extra: int = 0,
    root_extra: int = 0,
    num_experts: int = 1,
    experts_per_token: int = 1,
    router_bias: bool = False,
    shared_intermediate_size: int = 0,
    shared_gate: bool = False,
    num_dense_layers: int = 0,
    dense_intermediate_size: int = 0,
    dense_block_parameters: int | None = None,
    source: str = "",
) -> ModelSpec:
    """Return the spec of a transformer's stack of blocks, its parameters counted exactly.

    `num_positions` is the length of a learned position embedding, 0 for rotary ones. A norm has hidden_size weights
    (none without `norm_weights`), and as many biases with `layer_norm_bias`; `qk_norm` is what the norms of queries and
    keys have together. `attention_parameters` replaces the count of the four projections. `block_extra` and
    `root_extra` are what a family has beyond this, in each block and outside the blocks.

    With more than one expert there is a router, `shared_intermediate_size` is the inner size of what every token passes
    beside its experts (weighed by one row of weights with `shared_gate`), and `num_dense_layers` have a plain
    feed-forward of `dense_intermediate_size` instead, or are blocks of another kind with `dense_block_parameters`.
    """
    h, kv_heads = hidden_size, num_kv_heads or num_heads
    head = head_size or h // num_heads
    inner = intermediate_size or 4 * h
    q, kv = num_heads * head, kv_heads * head
    norm = (h if norm_weights else 0) + (h if layer_norm_bias else 0)
    attention = h * (q + 2 * kv) + q * h if attention_parameters is None else attention_parameters
    attention += (q + 2 * kv if qkv_bias else 0) + (h if output_bias else 0) + qk_norm
    matrices = 3 if gated_mlp else 2

    def feed_forward(size: int) -> int:
        return matrices * h * size + ((matrices - 1) * size + h if mlp_bias else 0)

    mlp = feed_forward(inner)
    router = (h + (1 if router_bias else 0)) * num_experts if num_experts > 1 else 0
    shared = feed_forward(shared_intermediate_size) + (h if shared_gate else 0) if shared_intermediate_size else 0
    around = attention + norms_per_block * norm + block_extra
    block = around + num_experts * mlp + router + shared
    dense_block = around + feed_forward(dense_intermediate_size)
    if dense_block_parameters is not None:
        dense_block = dense_block_parameters
    sparse_layers = num_layers - num_dense_layers
    blocks = sparse_layers * block + num_dense_layers * dense_block
    positions = num_positions * h
    token_embedding = vocab_size * h
    output = token_embedding + (vocab_size if head_bias else 0)
    root = token_embedding + positions + (norm if final_norm else 0) + root_extra
    total = blocks + root + (vocab_size if head_bias and tied_embeddings else 0) + (0 if tied_embeddings else output)
    idle_experts = sparse_layers * (num_experts - experts_per_token) * mlp
    return ModelSpec(
        name=name,
        num_parameters=total,
        num_layers=num_layers,
        hidden_size=h,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        tied_embeddings=tied_embeddings,
        block_parameters=blocks // num_layers,
        largest_block_parameters=max(block if sparse_layers else 0, dense_block if num_dense_layers else 0),
        head_size=head,
        gated_mlp=gated_mlp,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        shared_intermediate_size=shared_intermediate_size,
        num_active_parameters=total - idle_experts if num_experts > 1 else 0,
        expert_parameters=sparse_layers * num_experts * mlp if num_experts > 1 else 0,
        head_parameters=output,
        embedding_parameters=positions + (0 if tied_embeddings else token_embedding),
        source=source or "shapes",
    )


def gpt(
    name: str,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    vocab_size: int,
    sequence_length: int,
    tied_embeddings: bool = True,
    bias: bool = True,
    num_positions: int | None = None,
    **options: Any,
) -> ModelSpec:
    """Return the spec of a GPT-2-like model: learned positions, LayerNorm, GELU, biases unless `bias` is False."""
    return decoder(
        name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        num_positions=sequence_length if num_positions is None else num_positions,
        tied_embeddings=tied_embeddings,
        gated_mlp=False,
        layer_norm_bias=bias,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        **options,
    )
