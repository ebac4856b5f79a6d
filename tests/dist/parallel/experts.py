"""Trainings of the parity tests under expert parallelism: mixtures of experts, and five clipped steps on any layout."""

from __future__ import annotations

from typing import Any

import torch
from tests.dist.parallel import trainings
from tests.dist.parallel.trainings import VOCAB, prepared, trained
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def _mixtral(**more: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes | more))


def _qwen2() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = SIZES | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 10, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts_per_tok=2, decoder_sparse_step=1, **sizes))


def _deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = SIZES | {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


def _olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SIZES))


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = SIZES | {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes))


trainings.MODELS |= {
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2,
    "deepseek": _deepseek,
    "olmoe": _olmoe,
    "gpt-oss": _gpt_oss,
}


def train(name: str, experts: int, stage: int, sections: dict[str, Any] | None = None) -> dict[str, Any]:
    given = dict(sections or {})
    strategy = {"expert_parallel": experts, **given.pop("strategy", {})}
    return trained(name, *prepared(name, 1, stage, strategy=strategy, **given))


def several(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(*case) for case in cases]
