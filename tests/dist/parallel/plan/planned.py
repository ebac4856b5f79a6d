"""What ranks hold of a model's states in a layout, beside what the planner says of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distui
from distui.core.plan.memory import footprint
from distui.core.plan.models import load_config_json
from distui.core.plan.planned import strategy_of

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def build(kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES))


def states(cases: list[tuple[str, dict[str, int]]]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Return of each (model, strategy) bytes by category after a step: planned, and held by this rank."""
    torch.set_num_threads(1)
    return [_states(*case) for case in cases]


def _states(kind: str, strategy: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    stages = strategy.get("pipeline_parallel", 1)
    engine = distui.Engine(strategy=strategy, batch={"accumulation": stages} if stages > 1 else {})
    model: Any = build(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps({**model.config.to_dict(), "architectures": [type(model).__name__]}), "utf-8")
        spec = load_config_json(path, 16)
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters()))
    ids_BT = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(engine.data_index))
    engine.backward(model(input_ids=ids_BT, labels=ids_BT).loss)
    held = engine.backend.memory_by_category()
    optimizer.step()
    held["optimizer_states"] = engine.backend.memory_by_category()["optimizer_states"]
    planned = footprint(spec, strategy_of(engine.config, engine.num_processes)[0], "cpu").by_category()
    engine.free_memory()
    return planned, held
