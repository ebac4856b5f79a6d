"""The shapes of models: presets, a Hugging Face config.json, or a parameter count with typical shapes. Torch-free.

Parameters are counted by formula from the shapes; the tests hold the presets to the published counts.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.plan.presets import ALIASES, PRESETS, TYPICAL_SHAPES
from distui.core.plan.types import ModelSpec

DEFAULT_SEQUENCE_LENGTH = 4096
"""Upper bound of the sequence length assumed of a config.json: contexts of 128k are seldom trained on throughout."""


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
    layer_norm_bias: bool = False,
    norms_per_block: int = 2,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_bias: bool = False,
    qk_norm: bool = False,
    num_experts: int = 1,
    experts_per_token: int = 1,
    source: str = "",
) -> ModelSpec:
    """Return the spec of a decoder-only transformer, its parameters counted exactly.

    `num_positions` is the length of a learned position embedding, 0 for rotary ones. A norm has hidden_size weights,
    and as many biases with `layer_norm_bias`. With more than one expert there is a router without bias.
    """
    h, kv_heads = hidden_size, num_kv_heads or num_heads
    head = head_size or h // num_heads
    inner = intermediate_size or 4 * h
    q, kv = num_heads * head, kv_heads * head
    norm = 2 * h if layer_norm_bias else h
    attention = h * (q + 2 * kv) + q * h
    attention += (q + 2 * kv if qkv_bias else 0) + (h if output_bias else 0) + (2 * head if qk_norm else 0)
    matrices = 3 if gated_mlp else 2
    mlp = matrices * h * inner + ((matrices - 1) * inner + h if mlp_bias else 0)
    router = h * num_experts if num_experts > 1 else 0
    block = attention + num_experts * mlp + router + norms_per_block * norm
    positions = num_positions * h
    token_embedding = vocab_size * h
    output = token_embedding + (vocab_size if head_bias else 0)
    total = num_layers * block + token_embedding + positions + norm + (0 if tied_embeddings else output)
    idle_experts = num_layers * (num_experts - experts_per_token) * mlp
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
        block_parameters=block,
        head_size=head,
        gated_mlp=gated_mlp,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        num_active_parameters=total - idle_experts if num_experts > 1 else 0,
        expert_parameters=num_layers * num_experts * mlp if num_experts > 1 else 0,
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


def load_model(text: str, sequence_length: int | None = None) -> ModelSpec:
    """Return the shapes that `text` names: a preset, a path of a config.json or its folder, or a count such as `7B`.

    Raises: UserError with the nearest presets, or what is missing in the file.
    """
    stripped = text.strip()
    if count := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBtT])(?:illion)?", stripped):
        scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[count[2].lower()]
        return typical_model(round(float(count[1]) * scale), sequence_length)
    path = Path(stripped).expanduser()
    if stripped.endswith(".json") or path.is_dir():
        return load_config_json(path / "config.json" if path.is_dir() else path, sequence_length)
    key = stripped.lower().rsplit("/", 1)[-1].replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in PRESETS:
        near = difflib.get_close_matches(key, [*PRESETS, *ALIASES], n=3, cutoff=0.5)
        near = list(dict.fromkeys(ALIASES.get(name, name) for name in near))
        raise UserError(
            f"no model is called {text!r}",
            f"presets are {', '.join(PRESETS)}",
            f"write {' or '.join(near)}" if near else "write one of these, a config.json, or a count such as 7B",
        )
    preset = dict(PRESETS[key])
    kind, trained = preset.pop("kind"), preset.pop("seq")
    return _from_config(key, kind, preset, sequence_length or trained, f"preset {key}")


def typical_model(num_parameters: int, sequence_length: int | None = None) -> ModelSpec:
    """Return a model of `num_parameters` with the shape of the nearest well-known one.

    Raises: UserError below 100,000 parameters, where no shape is typical.
    """
    if num_parameters < 100_000:
        raise UserError(
            f"{num_parameters} parameters are too few for a typical shape", "the least is 100,000", "give a config.json"
        )
    nearest = min(TYPICAL_SHAPES, key=lambda row: abs(math.log(row[0] / num_parameters)))
    _, layers, hidden, heads = nearest
    # Below the smallest row the width shrinks with the square root, so that the blocks still hold most parameters.
    if num_parameters < TYPICAL_SHAPES[0][0]:
        hidden = max(32, int(hidden * math.sqrt(num_parameters / TYPICAL_SHAPES[0][0])) // 32 * 32)
        heads = hidden // 32
    vocab = min(32000, max(256, num_parameters // (8 * hidden)))
    root = 2 * vocab * hidden + hidden
    return ModelSpec(
        name=f"{_short(num_parameters)} parameters",
        num_parameters=num_parameters,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        intermediate_size=round(8 * hidden / 3),
        vocab_size=vocab,
        sequence_length=sequence_length or 2048,
        tied_embeddings=False,
        block_parameters=max(1, (num_parameters - root) // layers),
        head_size=hidden // heads,
        head_parameters=vocab * hidden,
        embedding_parameters=vocab * hidden,
        source=f"{num_parameters:,} parameters with the typical shape of {_short(int(nearest[0]))}: "
        f"{layers} layers, hidden size {hidden}",
    )


def _short(count: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def load_config_json(path: Path, sequence_length: int | None = None) -> ModelSpec:
    """Return the shapes of a Hugging Face config.json.

    Raises: UserError where it cannot be read, or lacks a size.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the model's config {path}", str(error), "give a Hugging Face config.json"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no model config", "it holds no JSON object", "give a Hugging Face config.json")
    values = {**values, **values["text_config"]} if isinstance(values.get("text_config"), dict) else values
    kind = str(values.get("model_type", "unknown"))
    context = values.get("max_position_embeddings") or values.get("n_positions") or values.get("n_ctx") or 0
    length = sequence_length or min(int(context) or DEFAULT_SEQUENCE_LENGTH, DEFAULT_SEQUENCE_LENGTH)
    name = str(values.get("_name_or_path") or path.parent.name or path.stem).rsplit("/", 1)[-1]
    known = kind in ("gpt2", "gptj", "gpt_neox", *GATED_KINDS)
    note = "" if known else f"; model_type {kind} is not known and was counted like a Llama"
    return _from_config(name, kind, values, length, f"{path}{note}")


GATED_KINDS = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "phi3",
    "olmo2",
    "smollm3",
)


def _from_config(name: str, kind: str, values: Mapping[str, Any], sequence_length: int, source: str) -> ModelSpec:
    def size(*keys: str, default: int | None = None) -> int:
        for key in keys:
            if values.get(key) is not None:
                return int(values[key])
        if default is None:
            raise UserError(
                f"the model config {source} lacks {keys[0]}",
                f"none of {', '.join(keys)} is in it",
                "give the config.json of a decoder-only transformer, or a parameter count such as 7B",
            )
        return default

    layers = size("num_hidden_layers", "n_layer", "num_layers")
    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head", "num_heads")
    shapes: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": size("vocab_size"),
        "sequence_length": sequence_length,
        "source": source,
    }
    if kind == "gpt2":
        positions = size("n_positions", "n_ctx", default=1024)
        inner = size("n_inner", default=4 * hidden)
        return gpt(name, **shapes, num_positions=positions, intermediate_size=inner)
    if kind == "gptj":
        # One norm a block (attention and feed-forward run side by side), no bias in attention, a bias on the head.
        inner = size("n_inner", default=4 * hidden)
        return decoder(
            name,
            **shapes,
            intermediate_size=inner,
            gated_mlp=False,
            layer_norm_bias=True,
            norms_per_block=1,
            mlp_bias=True,
            head_bias=True,
        )
    inner = size("intermediate_size", "ffn_dim", "n_inner")
    if kind == "gpt_neox":
        return decoder(
            name,
            **shapes,
            intermediate_size=inner,
            gated_mlp=False,
            layer_norm_bias=True,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
    experts = size("num_local_experts", "num_experts", default=1)
    if kind.endswith("_moe"):
        inner = size("moe_intermediate_size", default=inner)
    return decoder(
        name,
        **shapes,
        num_kv_heads=size("num_key_value_heads", default=heads),
        head_size=size("head_dim", default=hidden // heads),
        intermediate_size=inner,
        tied_embeddings=bool(values.get("tie_word_embeddings", kind == "gemma")),
        qkv_bias=kind in ("qwen2", "qwen2_moe") or bool(values.get("attention_bias", False)),
        output_bias=bool(values.get("attention_bias", False)) and not kind.startswith("qwen"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        num_experts=experts,
        experts_per_token=size("num_experts_per_tok", default=1) if experts > 1 else 1,
    )
