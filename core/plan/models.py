"""The shapes of models: presets, a Hugging Face config.json, or a parameter count with typical shapes. Torch-free.

Parameters are counted by formula from the shapes; the tests hold the presets to the published counts.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from pathlib import Path

from distui.core.errors import UserError
from distui.core.plan.families import FAMILIES, model_of
from distui.core.plan.presets import ALIASES, PRESETS, TYPICAL_SHAPES
from distui.core.plan.types import ModelSpec

DEFAULT_SEQUENCE_LENGTH = 4096
"""Upper bound of the sequence length assumed of a config.json: contexts of 128k are seldom trained on throughout."""

VARIANT = re.compile(
    r"-(hf|instruct|it|chat|base|uncased|cased|\d+k|patch16-224|v\d+(\.\d+)?|bnb-4bit|[48]bit|awq|gptq.*|fp8|bf16)$"
    r"|^(meta|deepseek-r1-distill)-|(?<=-)(coder|math|python)-"
)
"""Parts of names whose models have the same shapes."""


def load_model(text: str, sequence_length: int | None = None) -> ModelSpec:
    """Return the shapes that `text` names: preset, Hugging Face id, config.json or its folder, or count (`7B`).

    Raises: UserError with the nearest presets, or what is missing in the file.
    """
    stripped = text.strip()
    if count := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBtT])(?:illion)?", stripped):
        scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[count[2].lower()]
        return typical_model(round(float(count[1]) * scale), sequence_length)
    path = Path(stripped).expanduser()
    if stripped.endswith(".json") or path.is_dir():
        return load_config_json(path / "config.json" if path.is_dir() else path, sequence_length)
    name = stripped.lower().rsplit("/", 1)[-1].replace("_", "-")
    key = _preset(name)
    if key is None and (cached := _cached_config(stripped)) is not None:
        return load_config_json(cached, sequence_length)
    if key is None:
        near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=3, cutoff=0.5)
        near = list(dict.fromkeys(ALIASES.get(name, name) for name in near))
        families = dict.fromkeys(name.split("-")[0].split(".")[0] for name in PRESETS)
        either = "write one of these with its size, such as llama-3-8b, a config.json, or a count such as 7B"
        raise UserError(
            f"no model is called {text!r}",
            f"the {len(PRESETS)} presets are of {', '.join(families)}",
            f"write {' or '.join(near)}" if near else either,
        )
    preset = dict(PRESETS[key])
    kind, trained = preset.pop("kind"), preset.pop("seq")
    return model_of(key, kind, preset, sequence_length or trained, f"preset {key}")


def _preset(name: str) -> str | None:
    """Return the preset that a name means, also with other hyphens (`llama3-8b`) and ends (`-Instruct`)."""
    by_letters = {_letters(known): known for known in (*ALIASES, *PRESETS)}
    while True:
        known = by_letters.get(_letters(name), name)
        if (known := ALIASES.get(known, known)) in PRESETS:
            return known
        shorter = VARIANT.sub("", name)
        if shorter == name:
            return None
        name = shorter


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _cached_config(text: str) -> Path | None:
    """Return the config.json of a Hugging Face id that this machine has downloaded, the newest one."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return None
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = [path for path in hub.glob(f"models--{text.replace('/', '--')}/snapshots/*/config.json") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


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
    kind, part = str(values.get("model_type") or ""), ""
    text = values.get("text_config")
    if isinstance(text, dict) and kind not in FAMILIES:
        # A model of several kinds of input: its language model is most of it, and has a type of its own.
        part = f"; the language model of {kind} alone"
        values = {**values, **text}
        kind = str(values.get("model_type") or "")
    context = 0
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        context = context or (values[key] if isinstance(values.get(key), int) else 0)
    length = sequence_length or min(context or DEFAULT_SEQUENCE_LENGTH, DEFAULT_SEQUENCE_LENGTH)
    name = str(values.get("_name_or_path") or path.parent.name or path.stem).rsplit("/", 1)[-1]
    return model_of(name, kind, values, length, f"{path}{part}")
