"""What each family of models adds to a plain transformer, read from its config.json. Torch-free.

A family is one function of the config's values that returns the options of `shapes.decoder`. A key that a config.json
may leave out has the default that transformers gives it. tests/compat/test_model_counts.py holds every family to the
parameters that transformers builds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from distui.core.errors import UserError
from distui.core.plan.config_values import Values
from distui.core.plan.shapes import decoder
from distui.core.plan.types import ModelSpec

Options = dict[str, Any]


def _common(v: Values, tied: bool = False) -> Options:
    hidden = v.size("hidden_size", "n_embd", "d_model", "n_embed", "dim")
    heads = v.size("num_attention_heads", "n_head", "num_heads", "n_heads")
    layers = v.size("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    for name, number in (("hidden_size", hidden), ("attention heads", heads), ("layers", layers)):
        if number < 1:
            raise UserError(f"the model config has {number} {name}", "at least 1 is needed", "correct the file")
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": v.size("vocab_size"),
        "tied_embeddings": v.flag("tie_word_embeddings", tied),
    }


LAYER_NORM: Options = {"gated_mlp": False, "layer_norm_bias": True}
BIASES: Options = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


def _gpt2(v: Values) -> Options:
    shapes = _common(v, tied=True)
    inner = v.size("n_inner", default=4 * shapes["hidden_size"])
    positions = v.size("n_positions", "n_ctx", default=1024)
    return shapes | LAYER_NORM | BIASES | {"num_positions": positions, "intermediate_size": inner}


def _gpt_bigcode(v: Values) -> Options:
    return _gpt2(v) | ({"num_kv_heads": 1} if v.flag("multi_query", True) else {})


def _gpt_neo(v: Values) -> Options:
    shapes = _common(v, tied=True)
    inner = v.size("intermediate_size", default=4 * shapes["hidden_size"])
    positions = v.size("max_position_embeddings", default=2048)
    biases = {"output_bias": True, "mlp_bias": True}
    return shapes | LAYER_NORM | biases | {"num_positions": positions, "intermediate_size": inner}


def _gptj(v: Values) -> Options:
    # One norm a block (attention and feed-forward run side by side), no bias in attention, a bias on the head.
    shapes = _common(v)
    inner = v.size("n_inner", default=4 * shapes["hidden_size"])
    return shapes | LAYER_NORM | {"intermediate_size": inner, "norms_per_block": 1, "mlp_bias": True, "head_bias": True}


def _gpt_neox(v: Values) -> Options:
    bias = v.flag("attention_bias", True)
    own = {"intermediate_size": v.size("intermediate_size"), "qkv_bias": bias, "output_bias": bias, "mlp_bias": True}
    return _common(v) | LAYER_NORM | own


def _llama(v: Values, tied: bool = False, default: bool = False) -> Options:
    shapes = _common(v, tied)
    bias = v.flag("attention_bias", default)
    heads = shapes["num_heads"]
    return shapes | {
        "num_kv_heads": v.size("num_key_value_heads", default=heads),
        "head_size": v.size("head_dim", default=shapes["hidden_size"] // heads),
        "intermediate_size": v.size("intermediate_size"),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": v.flag("mlp_bias"),
    }


def _head_norms(options: Options) -> Options:
    """Return the options with a norm of one head's size on queries and on keys."""
    return options | {"qk_norm": 2 * options["head_size"]}


def _whole_norms(options: Options) -> Options:
    """Return the options with norms over all heads of queries and of keys."""
    return options | {"qk_norm": (options["num_heads"] + options["num_kv_heads"]) * options["head_size"]}


def _smollm3(v: Values) -> Options:
    return _llama(v, tied=True)


def _olmo(v: Values) -> Options:
    return _llama(v) | {"norm_weights": False}


def _olmo2(v: Values) -> Options:
    return _whole_norms(_llama(v))


def _qwen2(v: Values) -> Options:
    return _llama(v) | {"qkv_bias": True}


def _qwen3(v: Values) -> Options:
    return _head_norms(_llama(v))


def _gemma(v: Values) -> Options:
    return _llama(v, tied=True)


def _gemma2(v: Values) -> Options:
    return _gemma(v) | {"norms_per_block": 4}


def _gemma3(v: Values) -> Options:
    # Its published config.json files leave out what is the default of the class.
    filled = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    return _head_norms(
        _gemma2(Values(filled | {key: found for key, found in v.values.items() if found is not None}, v.source))
    )


def _glm4(v: Values) -> Options:
    return _llama(v, default=True) | {"output_bias": False, "norms_per_block": 4}


def _phi(v: Values) -> Options:
    own = {"norms_per_block": 1, "head_bias": True, "mlp_bias": True, "qkv_bias": True, "output_bias": True}
    options = _llama(v) | LAYER_NORM | own
    return options | ({"qk_norm": 4 * options["head_size"]} if v.flag("qk_layernorm") else {})


def _phimoe(v: Values) -> Options:
    options = _mixture(v, _llama(v)) | {"layer_norm_bias": True, "head_bias": v.flag("lm_head_bias")}
    return options | {"intermediate_size": v.size("intermediate_size")}


def _stablelm(v: Values) -> Options:
    own: Options = {"layer_norm_bias": True, "qkv_bias": v.flag("use_qkv_bias"), "output_bias": False}
    options = _llama(v) | own | {"norms_per_block": 1 if v.flag("use_parallel_residual") else 2}
    return _whole_norms(options) if v.flag("qk_layernorm") else options


def _starcoder2(v: Values) -> Options:
    bias = v.flag("use_bias", True)
    return _llama(v, tied=True) | LAYER_NORM | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}


def _cohere(v: Values) -> Options:
    options = _llama(v, tied=True) | {"norms_per_block": 1}
    return _whole_norms(options) if v.flag("use_qk_norm") else options


def _mpt(v: Values) -> Options:
    shapes = _common(v, tied=True)
    inner = v.size("expansion_ratio", default=4) * shapes["hidden_size"]
    return shapes | {"gated_mlp": False, "intermediate_size": inner}


def _falcon(v: Values) -> Options:
    shapes = _common(v, tied=True)
    heads, bias = shapes["num_heads"], v.flag("bias")
    if v.flag("new_decoder_architecture"):
        kv_heads, norms = v.size("num_kv_heads", default=heads), v.size("num_ln_in_parallel_attn", default=2)
    else:
        kv_heads = 1 if v.flag("multi_query", True) else heads
        norms = 1 if v.flag("parallel_attn", True) else 2
    inner = v.size("ffn_hidden_size", default=4 * shapes["hidden_size"])
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}
    own = {"num_kv_heads": kv_heads, "norms_per_block": norms, "intermediate_size": inner}
    return shapes | LAYER_NORM | biases | own


def _opt(v: Values) -> Options:
    shapes = _common(v, tied=True)
    hidden, bias = shapes["hidden_size"], v.flag("enable_bias", True)
    width = v.size("word_embed_proj_dim", default=hidden)
    affine = v.flag("layer_norm_elementwise_affine", True)
    projections = 2 * hidden * width if width != hidden else 0
    narrower = shapes["vocab_size"] * (width - hidden) * (1 if shapes["tied_embeddings"] else 2)
    own = {
        "num_positions": v.size("max_position_embeddings", default=2048) + 2,
        "intermediate_size": v.size("ffn_dim"),
        "final_norm": v.flag("do_layer_norm_before", True) and not v.flag("_remove_final_layer_norm"),
        "root_extra": projections + narrower,
        "norm_weights": affine,
        "layer_norm_bias": affine,
        "gated_mlp": False,
    }
    return shapes | own | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}


def _bloom(v: Values) -> Options:
    shapes = _common(v, tied=True)
    return shapes | LAYER_NORM | BIASES | {"root_extra": 2 * shapes["hidden_size"]}


def _mixture(v: Values, options: Options) -> Options:
    """Return the options with experts: how many, how large, how many layers have none."""
    experts = v.size("num_local_experts", "num_experts", "n_routed_experts")
    inner = v.size("moe_intermediate_size", "intermediate_size")
    layers = options["num_layers"]
    step = max(1, v.size("decoder_sparse_step", default=1))
    plain = {int(index) for index in v.get("mlp_only_layers", ())} | set(
        range(v.size("first_k_dense_replace", default=0))
    )
    dense = sum(index in plain or (index + 1) % step != 0 for index in range(layers))
    return options | {
        "num_experts": experts,
        "experts_per_token": v.size("num_experts_per_tok", default=1),
        "intermediate_size": inner,
        "num_dense_layers": dense,
        "dense_intermediate_size": v.size("intermediate_size", default=inner) if dense else 0,
    }


def _mixtral(v: Values) -> Options:
    return _mixture(v, _llama(v))


def _qwen2_moe(v: Values) -> Options:
    options = _mixture(v, _llama(v) | {"qkv_bias": v.flag("qkv_bias", True)})
    return options | {"shared_intermediate_size": v.size("shared_expert_intermediate_size"), "shared_gate": True}


def _qwen3_moe(v: Values) -> Options:
    return _mixture(v, _head_norms(_llama(v)))


def _olmoe(v: Values) -> Options:
    return _mixture(v, _olmo2(v))


def _gpt_oss(v: Values) -> Options:
    options = _mixture(v, _llama(v, default=True))
    return options | {"mlp_bias": True, "router_bias": True, "block_extra": options["num_heads"]}  # attention sinks


def _deepseek(v: Values) -> Options:
    options = _mixture(v, _llama(v))
    return options | {"shared_intermediate_size": v.size("n_shared_experts", default=0) * options["intermediate_size"]}


def _latent(v: Values) -> Options:
    """Return the options of DeepSeek V2 and V3: latent attention (arXiv 2405.04434, section 2.1) and experts."""
    options = _deepseek(v)
    h, heads = options["hidden_size"], options["num_heads"]
    rank, rope = v.size("kv_lora_rank", default=512), v.size("qk_rope_head_dim", default=64)
    plain, value = v.size("qk_nope_head_dim", default=128), v.size("v_head_dim", default=128)
    # V2-Lite says null: queries without a latent.
    q_rank = v.size("q_lora_rank", default=0)
    queries = q_rank * (h + 1 + heads * (plain + rope)) if q_rank else h * heads * (plain + rope)
    keys = h * (rank + rope) + rank + rank * heads * (plain + value)
    bias = (q_rank + rank + rope + h) if v.flag("attention_bias") else 0
    return options | {
        "attention_parameters": queries + keys + heads * value * h + bias,
        "qkv_bias": False,
        "output_bias": False,
        "num_kv_heads": heads,
        "head_size": plain + rope,
    }


def _bert(v: Values) -> Options:
    shapes = _common(v, tied=True)
    h, inner = shapes["hidden_size"], v.size("intermediate_size", "hidden_dim")
    positions = v.size("max_position_embeddings", default=512)
    types = v.size("type_vocab_size", default=0) * h
    # The norm of the embeddings; before the output a dense layer with a norm, and a bias.
    own = {"num_positions": positions, "intermediate_size": inner, "final_norm": False, "head_bias": True}
    return shapes | LAYER_NORM | BIASES | own | {"root_extra": types + 2 * h + h * h + 3 * h}


def _t5(v: Values) -> Options:
    shapes = _common(v, tied=True)
    h, heads = shapes["hidden_size"], shapes["num_heads"]
    inner, width = v.size("d_ff"), heads * v.size("d_kv", default=64)
    encoders = shapes["num_layers"]
    decoders = v.size("num_decoder_layers", default=encoders)
    gated = str(v.get("feed_forward_proj", "relu")).startswith("gated")
    mlp = (3 if gated else 2) * h * inner
    # A decoder's block has two attentions and three norms; `decoder` counts the encoder's, and the rest is extra.
    return shapes | {
        "num_layers": encoders + decoders,
        "num_dense_layers": decoders,
        "attention_parameters": 4 * h * width,
        "dense_block_parameters": 8 * h * width + 3 * h + mlp,
        "head_size": v.size("d_kv", default=64),
        "intermediate_size": inner,
        "gated_mlp": gated,
        "root_extra": 2 * v.size("relative_attention_num_buckets", default=32) * heads + h,
    }


def _vit(v: Values) -> Options:
    h, patch = v.size("hidden_size"), v.size("patch_size", default=16)
    labels = len(v.get("id2label", {})) or v.size("num_labels", default=2)
    channels = v.size("num_channels", default=3)
    return (
        LAYER_NORM
        | BIASES
        | {
            "num_layers": v.size("num_hidden_layers"),
            "hidden_size": h,
            "num_heads": v.size("num_attention_heads"),
            "vocab_size": 0,
            "tied_embeddings": True,
            "intermediate_size": v.size("intermediate_size"),
            "num_positions": vit_length(v),
            "qkv_bias": v.flag("qkv_bias", True),
            # The class token, the patches' convolution, the classifier.
            "root_extra": h + (patch * patch * channels + 1) * h + (h + 1) * labels,
        }
    )


def vit_length(v: Values) -> int:
    """Return the tokens of an image: its patches and one for the class."""
    return (v.size("image_size", default=224) // v.size("patch_size", default=16)) ** 2 + 1


# fmt: off
FAMILIES: dict[str, Callable[[Values], Options]] = {
    "bert": _bert, "bloom": _bloom, "cohere": _cohere, "cohere2": _cohere, "deepseek": _deepseek,
    "deepseek_v2": _latent, "deepseek_v3": _latent, "distilbert": _bert, "falcon": _falcon, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3_text": _gemma3, "glm4": _glm4, "gpt2": _gpt2, "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo, "gpt_neox": _gpt_neox, "gpt_oss": _gpt_oss, "gptj": _gptj, "granite": _llama,
    "llama": _llama, "mistral": _llama, "mixtral": _mixtral, "mpt": _mpt, "olmo": _olmo, "olmo2": _olmo2,
    "olmoe": _olmoe, "opt": _opt, "phi": _phi, "phi3": _llama, "phimoe": _phimoe, "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "roberta": _bert, "smollm3": _smollm3,
    "stablelm": _stablelm, "starcoder2": _starcoder2, "t5": _t5, "vit": _vit,
}
# fmt: on
"""By model_type, as config.json calls it."""

NOTES = {
    "bert": "with the head for masked words",
    "distilbert": "with the head for masked words",
    "roberta": "with the head for masked words",
    "t5": "encoder and decoder, as many tokens in as out",
    "vit": "with its classifier; a sample is the patches of an image",
    "deepseek_v3": "without the layers that predict further tokens",
}


def find_family(kind: str, source: str) -> Callable[[Values], Options]:
    """Return the family that a config.json calls `kind`.

    Raises: UserError with what to do instead, where it is not known: a count by another family's shapes would be wrong.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    near = difflib.get_close_matches(kind, FAMILIES, n=2, cutoff=0.7)
    raise UserError(
        f"models of type {kind!r} are not known ({source})" if kind else f"{source} names no model_type",
        f"known are {', '.join(FAMILIES)}" + (f"; nearest is {' or '.join(near)}" if near else ""),
        "give the number of parameters such as --model 7B (typical shapes), "
        "or let the model be measured: distui plan --script train.py:build_model",
    )


def model_of(name: str, kind: str, values: Mapping[str, Any], sequence_length: int, source: str) -> ModelSpec:
    """Return the spec of the model of family `kind` with the sizes in `values`.

    Raises: UserError where the family is not known or a size is missing.
    """
    read = Values(values, source)
    options = find_family(kind, source)(read)
    if kind == "vit":
        sequence_length = vit_length(read)
    if note := NOTES.get(kind):
        source += f"; {note}"
    return decoder(name, sequence_length=sequence_length, source=source, **options)
