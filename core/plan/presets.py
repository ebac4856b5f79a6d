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
    "gemma-2b": _llama(18, 2048, 8, 16384, 256000, 8192, 1, head_dim=256, tie_word_embeddings=True),
    "gemma-7b": _llama(28, 3072, 16, 24576, 256000, 8192, 16, head_dim=256, tie_word_embeddings=True),
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
    "gpt-j-6b": "gpt-j-6b",
    "gpt2-small": "gpt2",
    "llama-1-7b": "llama-7b",
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.3-70b": "llama-3-70b",
    "tinyllama": "tinyllama-1.1b",
    "mixtral": "mixtral-8x7b",
    "mistral": "mistral-7b",
}
