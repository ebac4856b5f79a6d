"""Shapes of well-known models, as their own config.json give them. Data only."""

from __future__ import annotations

from typing import Any


# fmt: off
def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 50257, "seq": 1024}


def _llama(layers: int, hidden: int, heads: int, inner: int, vocab: int, seq: int, kv: int | None = None,
           **more: Any) -> dict[str, Any]:
    return {"kind": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": kv or heads, "intermediate_size": inner, "vocab_size": vocab, "seq": seq, **more}


def _pythia(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return {"kind": "gpt_neox", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden, "vocab_size": vocab, "seq": 2048}


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": "opt", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "ffn_dim": 4 * hidden, "vocab_size": 50272, "seq": 2048}


def _gemma(kind: str, layers: int, hidden: int, heads: int, inner: int, kv: int, head: int = 256) -> dict[str, Any]:
    vocab = {"gemma": 256000, "gemma2": 256000, "gemma3_text": 262208}[kind]
    return _llama(layers, hidden, heads, inner, vocab, 8192, kv, kind=kind, head_dim=head)


def _bert(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": "bert", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden, "vocab_size": 30522, "type_vocab_size": 2, "seq": 512}


def _t5(layers: int, hidden: int, heads: int, inner: int, head: int = 64) -> dict[str, Any]:
    return {"kind": "t5", "num_layers": layers, "d_model": hidden, "num_heads": heads, "d_ff": inner, "d_kv": head,
            "vocab_size": 32128, "seq": 512}


def _vit(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": "vit", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden, "patch_size": 16, "image_size": 224, "num_labels": 1000, "seq": 197}


_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt-j-6b": {"kind": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "vocab_size": 50400, "seq": 2048},
    "gpt-neox-20b": _pythia(44, 6144, 64, 50432),
    "pythia-70m": _pythia(6, 512, 8, 50304),
    "pythia-160m": _pythia(12, 768, 12, 50304),
    "pythia-410m": _pythia(24, 1024, 16, 50304),
    "pythia-1b": _pythia(16, 2048, 8, 50304),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
    "tinyllama-1.1b": _llama(22, 2048, 32, 5632, 32000, 2048, 4),
    "llama-7b": _llama(32, 4096, 32, 11008, 32000, 2048),
    "llama-13b": _llama(40, 5120, 40, 13824, 32000, 2048),
    "llama-30b": _llama(60, 6656, 52, 17920, 32000, 2048),
    "llama-65b": _llama(80, 8192, 64, 22016, 32000, 2048),
    "llama-2-7b": _llama(32, 4096, 32, 11008, 32000, 4096),
    "llama-2-13b": _llama(40, 5120, 40, 13824, 32000, 4096),
    "llama-2-70b": _llama(80, 8192, 64, 28672, 32000, 4096, 8),
    "llama-3-8b": _llama(32, 4096, 32, 14336, 128256, 8192, 8),
    "llama-3-70b": _llama(80, 8192, 64, 28672, 128256, 8192, 8),
    "llama-3.1-405b": _llama(126, 16384, 128, 53248, 128256, 8192, 8),
    "llama-3.2-1b": _llama(16, 2048, 32, 8192, 128256, 8192, 8, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(28, 3072, 24, 8192, 128256, 8192, 8, tie_word_embeddings=True),
    "mistral-7b": _llama(32, 4096, 32, 14336, 32000, 8192, 8),
    "mixtral-8x7b": _llama(32, 4096, 32, 14336, 32000, 4096, 8, kind="mixtral", num_local_experts=8,
                           num_experts_per_tok=2),
    "mixtral-8x22b": _llama(56, 6144, 48, 16384, 32000, 4096, 8, kind="mixtral", num_local_experts=8,
                            num_experts_per_tok=2),
    "qwen2.5-0.5b": _llama(24, 896, 14, 4864, 151936, 4096, 2, kind="qwen2", tie_word_embeddings=True),
    "qwen2.5-1.5b": _llama(28, 1536, 12, 8960, 151936, 4096, 2, kind="qwen2", tie_word_embeddings=True),
    "qwen2.5-3b": _llama(36, 2048, 16, 11008, 151936, 4096, 2, kind="qwen2", tie_word_embeddings=True),
    "qwen2.5-7b": _llama(28, 3584, 28, 18944, 152064, 4096, 4, kind="qwen2"),
    "qwen2.5-14b": _llama(48, 5120, 40, 13824, 152064, 4096, 8, kind="qwen2"),
    "qwen2.5-32b": _llama(64, 5120, 40, 27648, 152064, 4096, 8, kind="qwen2"),
    "qwen2.5-72b": _llama(80, 8192, 64, 29568, 152064, 4096, 8, kind="qwen2"),
    "qwen3-0.6b": _llama(28, 1024, 16, 3072, 151936, 4096, 8, kind="qwen3", head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _llama(36, 4096, 32, 12288, 151936, 4096, 8, kind="qwen3", head_dim=128),
    "qwen3-32b": _llama(64, 5120, 64, 25600, 151936, 4096, 8, kind="qwen3", head_dim=128),
    "qwen3-30b-a3b": _llama(48, 2048, 32, 768, 151936, 4096, 4, kind="qwen3_moe", head_dim=128, num_experts=128,
                            num_experts_per_tok=8),
    "qwen3-1.7b": _llama(28, 2048, 16, 6144, 151936, 4096, 8, kind="qwen3", head_dim=128, tie_word_embeddings=True),
    "qwen3-4b": _llama(36, 2560, 32, 9728, 151936, 4096, 8, kind="qwen3", head_dim=128, tie_word_embeddings=True),
    "qwen3-14b": _llama(40, 5120, 40, 17408, 151936, 4096, 8, kind="qwen3", head_dim=128),
    "qwen3-235b-a22b": _llama(94, 4096, 64, 1536, 151936, 4096, 4, kind="qwen3_moe", head_dim=128, num_experts=128,
                              num_experts_per_tok=8),
    "gemma-2b": _gemma("gemma", 18, 2048, 8, 16384, 1),
    "gemma-7b": _gemma("gemma", 28, 3072, 16, 24576, 16),
    "gemma-2-2b": _gemma("gemma2", 26, 2304, 8, 9216, 4),
    "gemma-2-9b": _gemma("gemma2", 42, 3584, 16, 14336, 8),
    "gemma-2-27b": _gemma("gemma2", 46, 4608, 32, 36864, 16, 128),
    "gemma-3-1b": _gemma("gemma3_text", 26, 1152, 4, 6912, 1) | {"vocab_size": 262144},
    "gemma-3-4b": _gemma("gemma3_text", 34, 2560, 8, 10240, 4),
    "gemma-3-12b": _gemma("gemma3_text", 48, 3840, 16, 15360, 8),
    "gemma-3-27b": _gemma("gemma3_text", 62, 5376, 32, 21504, 16, 128),
    "deepseek-moe-16b": _llama(28, 2048, 16, 10944, 102400, 4096, 16, kind="deepseek", n_routed_experts=64,
                               n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
                               first_k_dense_replace=1),
    "deepseek-v2-lite": _llama(27, 2048, 16, 10944, 102400, 4096, 16, kind="deepseek_v2", n_routed_experts=64,
                               n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
                               first_k_dense_replace=1, **_LATENT),
    "deepseek-v3": _llama(61, 7168, 128, 18432, 129280, 4096, 128, kind="deepseek_v3", n_routed_experts=256,
                          n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
                          first_k_dense_replace=3, q_lora_rank=1536, **_LATENT),
    "gpt-oss-20b": _llama(24, 2880, 64, 2880, 201088, 4096, 8, kind="gpt_oss", head_dim=64, num_local_experts=32,
                          num_experts_per_tok=4),
    "gpt-oss-120b": _llama(36, 2880, 64, 2880, 201088, 4096, 8, kind="gpt_oss", head_dim=64, num_local_experts=128,
                           num_experts_per_tok=4),
    "phi-2": _llama(32, 2560, 32, 10240, 51200, 2048, kind="phi"),
    "phi-3-mini": _llama(32, 3072, 32, 8192, 32064, 4096, kind="phi3"),
    "phi-4": _llama(40, 5120, 40, 17920, 100352, 4096, 10, kind="phi3"),
    "olmo-2-7b": _llama(32, 4096, 32, 11008, 100352, 4096, kind="olmo2"),
    "olmoe-7b-a1b": _llama(16, 2048, 16, 1024, 50304, 4096, kind="olmoe", num_experts=64, num_experts_per_tok=8),
    "smollm3-3b": _llama(36, 2048, 16, 11008, 128256, 4096, 4, kind="smollm3"),
    "starcoder2-7b": _llama(32, 4608, 36, 18432, 49152, 4096, 4, kind="starcoder2", use_bias=True),
    "falcon-7b": {"kind": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71,
                  "vocab_size": 65024, "seq": 2048},
    "falcon-40b": {"kind": "falcon", "num_hidden_layers": 60, "hidden_size": 8192, "num_attention_heads": 128,
                   "num_kv_heads": 8, "new_decoder_architecture": True, "vocab_size": 65024, "seq": 2048},
    "bloom-560m": {"kind": "bloom", "n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250880,
                   "seq": 2048},
    "bloom-7b1": {"kind": "bloom", "n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250880,
                  "seq": 2048},
    "bloom-176b": {"kind": "bloom", "n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880,
                   "seq": 2048},
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "gpt-neo-1.3b": {"kind": "gpt_neo", "num_layers": 24, "hidden_size": 2048, "num_heads": 16, "vocab_size": 50257,
                     "seq": 2048},
    "gpt-neo-2.7b": {"kind": "gpt_neo", "num_layers": 32, "hidden_size": 2560, "num_heads": 20, "vocab_size": 50257,
                     "seq": 2048},
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "t5-base": _t5(12, 768, 12, 3072),
    "t5-large": _t5(24, 1024, 16, 4096),
    "t5-3b": _t5(24, 1024, 32, 16384, 128),
    "t5-11b": _t5(24, 1024, 128, 65536, 128),
    "vit-base": _vit(12, 768, 12),
    "vit-large": _vit(24, 1024, 16),
}
"""Shapes as the models' own config.json give them; `seq` is the length they were trained on (at most 8192)."""

TYPICAL_SHAPES = (
    (10e6, 6, 320, 5), (30e6, 8, 512, 8), (70e6, 10, 640, 10), (125e6, 12, 768, 12), (350e6, 24, 1024, 16),
    (760e6, 24, 1536, 16), (1.3e9, 24, 2048, 16), (2.7e9, 32, 2560, 32), (6.7e9, 32, 4096, 32), (13e9, 40, 5120, 40),
    (32.5e9, 60, 6656, 52), (65e9, 80, 8192, 64), (175e9, 96, 12288, 96), (530e9, 105, 20480, 128),
    (1e12, 128, 25600, 160),
)
"""(parameters, layers, hidden_size, heads): GPT-3 (arXiv 2005.14165, table 2.1), LLaMA (arXiv 2302.13971, table 2),
Megatron-LM (arXiv 2104.04473, table 1), and the same proportions below 125M."""
# fmt: on

ALIASES = {
    "gpt-j": "gpt-j-6b",
    "gptj": "gpt-j-6b",
    "gpt2-small": "gpt2",
    "llama-1-7b": "llama-7b",
    "llama-1b": "llama-3.2-1b",
    "llama-3b": "llama-3.2-3b",
    "llama-8b": "llama-3-8b",
    "llama-70b": "llama-3-70b",
    "llama-405b": "llama-3.1-405b",
    "llama-1-13b": "llama-13b",
    "llama-1-30b": "llama-30b",
    "llama-1-65b": "llama-65b",
    "llama-3-405b": "llama-3.1-405b",
    "code-llama-7b": "llama-2-7b",
    "code-llama-13b": "llama-2-13b",
    "code-llama-70b": "llama-2-70b",
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.3-70b": "llama-3-70b",
    "tinyllama": "tinyllama-1.1b",
    "mixtral": "mixtral-8x7b",
    "mistral": "mistral-7b",
    "bloom": "bloom-176b",
    "bloom-7b": "bloom-7b1",
    "phi-3-mini-4k": "phi-3-mini",
    "olmo-2-1124-7b": "olmo-2-7b",
    "olmoe-1b-7b": "olmoe-7b-a1b",
    "olmoe-1b-7b-0924": "olmoe-7b-a1b",
    "smollm3": "smollm3-3b",
    "deepseek-r1": "deepseek-v3",
}
