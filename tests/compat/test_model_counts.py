"""Every family's parameters, as the planner counts them from a config.json, against what transformers builds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distui.core.plan.families import FAMILIES
from distui.core.plan.models import load_config_json

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6}
SMALL = SIZES | {"vocab_size": 331, "max_position_embeddings": 64}
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 24}
OLD = {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 331, "n_positions": 64}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
MIXED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
LATENT = SMALL | {"num_key_value_heads": 6, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
LATENT |= {"v_head_dim": 12, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 40, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
BIASES = {"attention_bias": True}

CASES: dict[str, list[dict[str, Any]]] = {
    "bert": [SMALL, SMALL | {"type_vocab_size": 3}],
    "bloom": [{"hidden_size": 96, "n_layer": 3, "n_head": 6, "vocab_size": 331}],
    "cohere": [GROUPED, GROUPED | {"use_qk_norm": True}],
    "cohere2": [WIDE_HEADS],
    "deepseek_v2": [LATENT | {"q_lora_rank": 24}, LATENT | {"q_lora_rank": None}],
    "deepseek_v3": [LATENT | {"q_lora_rank": 24}, LATENT | {"q_lora_rank": 24, "attention_bias": True}],
    "distilbert": [{"dim": 96, "n_layers": 3, "n_heads": 6, "hidden_dim": 160, "vocab_size": 331}],
    "falcon": [
        SMALL,
        SMALL | {"bias": True, "parallel_attn": False, "multi_query": False} | UNTIED,
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
    "gemma": [WIDE_HEADS, WIDE_HEADS | UNTIED],
    "gemma2": [WIDE_HEADS],
    "gemma3_text": [WIDE_HEADS, {}],
    "glm4": [WIDE_HEADS],
    "gpt2": [OLD, OLD | {"n_inner": 200}],
    "gpt_bigcode": [OLD, OLD | {"multi_query": False}],
    "gpt_neo": [
        {"hidden_size": 96, "num_layers": 4, "num_heads": 6, "vocab_size": 331, "attention_types": [[["global"], 4]]}
    ],
    "gpt_neox": [SMALL, SMALL | {"attention_bias": False} | TIED],
    "gpt_oss": [WIDE_HEADS | EXPERTS],
    "gptj": [OLD],
    "granite": [GROUPED | BIASES | {"mlp_bias": True}],
    "llama": [GROUPED, WIDE_HEADS | BIASES | TIED, GROUPED | {"mlp_bias": True}],
    "mistral": [WIDE_HEADS],
    "mixtral": [GROUPED | EXPERTS],
    "mpt": [{"d_model": 96, "n_layers": 3, "n_heads": 6, "vocab_size": 331}],
    "olmo": [GROUPED],
    "olmo2": [GROUPED],
    "olmoe": [GROUPED | {"num_experts": 5, "num_experts_per_tok": 2}],
    "opt": [
        SMALL | {"ffn_dim": 160},
        SMALL | {"ffn_dim": 160, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
        SMALL | {"ffn_dim": 160, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
    "phi": [GROUPED, GROUPED | {"qk_layernorm": True}],
    "phi3": [GROUPED],
    "phimoe": [GROUPED | EXPERTS, GROUPED | EXPERTS | BIASES | {"lm_head_bias": True}],
    "qwen2": [GROUPED, GROUPED | TIED],
    "qwen2_moe": [GROUPED | MIXED | {"shared_expert_intermediate_size": 72, "decoder_sparse_step": 1}],
    "qwen3": [WIDE_HEADS, WIDE_HEADS | BIASES],
    "qwen3_moe": [WIDE_HEADS | MIXED, WIDE_HEADS | MIXED | {"decoder_sparse_step": 2, "mlp_only_layers": []}],
    "roberta": [SMALL],
    "smollm3": [GROUPED],
    "stablelm": [GROUPED, GROUPED | {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}],
    "starcoder2": [GROUPED, GROUPED | {"use_bias": False}],
    "t5": [
        {"d_model": 96, "d_kv": 12, "d_ff": 160, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6},
        {"d_model": 96, "d_ff": 160, "num_layers": 2, "num_heads": 6, "feed_forward_proj": "gated-gelu"} | UNTIED,
    ],
    "vit": [SIZES | {"image_size": 64, "patch_size": 8, "num_labels": 7}, SIZES | {"qkv_bias": False}],
}
FACTORIES = {"t5": "AutoModelForSeq2SeqLM", "vit": "AutoModelForImageClassification"}
FACTORIES |= dict.fromkeys(("bert", "roberta", "distilbert"), "AutoModelForMaskedLM")


def test_no_family_is_left_out() -> None:
    # DeepSeekMoE's first model runs code of its own, which transformers does not ship.
    assert set(FAMILIES) - set(CASES) == {"deepseek"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CASES)
def test_a_family_has_exactly_the_parameters_that_transformers_builds(kind: str, tmp_path: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    factory = getattr(transformers, FACTORIES.get(kind, "AutoModelForCausalLM"))
    for options in CASES[kind]:
        config = transformers.AutoConfig.for_model(kind, **{"pad_token_id": 0} | options)
        with torch.device("meta"):
            model = factory.from_config(config)
        config.save_pretrained(tmp_path)  # leaves out what is the default of all models, as published files do
        spec = load_config_json(tmp_path / "config.json")
        assert spec.num_parameters == sum(param.numel() for param in model.parameters()), (kind, options)
        assert 0 < spec.root_parameters < spec.num_parameters
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
