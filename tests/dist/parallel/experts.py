"""Trainings of the parity tests under expert parallelism: mixtures of experts, and five clipped steps on any layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.dist.parallel import trainings
from tests.dist.parallel.trainings import VOCAB, loss_of, prepared, steps, trained
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.units import partition

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
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
        "use_cache": False,
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
    return trained(name, *prepared(name, 1, stage, strategy=strategy, **given), even_loss)


def even_loss(name: str, model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the loss of sequences that two ranks divide."""
    return loss_of(name, model, ids_BT[:, :8])


def several(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(*case) for case in cases]


# ---- other models, other uses ----------------------------------------------------------------------------------------


class Skewed(nn.Module):
    """A mixture in which all tokens go to the first experts, so that the second rank gets none; some of it frozen."""

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(SkewedLayer() for _ in range(3))
        self.head = nn.Linear(16, VOCAB)
        for name, param in self.named_parameters():
            param.requires_grad_((frozen.strip("!") not in name) ^ frozen.startswith("!") or not frozen)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        odd = ids_BT[:, 0] % 2 == 1
        for layer in self.layers:
            x_BTD = layer(x_BTD, odd)
        return self.head(x_BTD)


class Experts(nn.Module):
    """Not transformers' own: two matrices an expert, in a loop."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, dim, 2 * dim) * 0.2)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * dim, dim) * 0.2)

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, place = torch.where(indices == expert)
            if len(token):
                inner = torch.relu(hidden[token] @ self.up[expert]) @ self.down[expert]
                found = found.index_add(0, token, inner * weights[token, place, None])
        return found


class SkewedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 2)
        self.experts = Experts(4, 16)
        self.seldom = nn.Parameter(torch.ones(16))

    def forward(self, x_BTD: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        if odd.any():  # in some batches on one rank alone
            x_BTD = x_BTD + self.seldom * odd[:, None, None]
        hidden = self.norm(x_BTD).flatten(0, 1)
        weights = self.gate(hidden).softmax(-1)
        chosen = torch.tensor([0, 1]).expand(len(hidden), 2)
        return x_BTD + self.experts(hidden, chosen, weights).view_as(x_BTD)


trainings.MODELS |= {
    "skewed": lambda: Skewed(""),
    "skewed-frozen-experts": lambda: Skewed("experts"),
    "skewed-experts-only": lambda: Skewed("!experts"),
    "skewed-frozen-up": lambda: Skewed("up"),
}


def plain_loss(name: str, model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten())


def skewed(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Each layer is a unit of its own, so that sums, gathers and tokens cross."""
    torch.set_num_threads(1)
    before, partition.SMALL_UNIT_NUMEL = partition.SMALL_UNIT_NUMEL, 1
    try:
        return [_skewed(*case) for case in cases]
    finally:
        partition.SMALL_UNIT_NUMEL = before


def _skewed(name: str, num_experts: int, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    strategy = {"expert_parallel": num_experts}
    return trained(name, *prepared(name, 1, stage, strategy=strategy, **sections), plain_loss)


def with_losses_of_routers(num_experts: int, stage: int) -> dict[str, Any]:
    """Train with the balancing loss that transformers adds in each forward, of a rank's own batch."""
    trainings.MODELS["balanced"] = lambda: _mixtral(output_router_logits=True, router_aux_loss_coef=0.5)
    return train("balanced", num_experts, stage)


# ---- distui.MoE ------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two layers of distui.MoE, with a shared expert and balancing, one of them of a small capacity."""

    def __init__(self, capacity: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(MixtureLayer(capacity) for _ in range(2))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD).clone()  # FSDP2 warns of views


class MixtureLayer(nn.Module):
    def __init__(self, capacity: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.moe = distui.MoE(
            16, 12, 4, shared_inner=8, scores="sigmoid", scale=2.0, balance_rate=0.01, capacity_factor=capacity
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.moe(self.norm(x_BTD))


trainings.MODELS |= {"mixture": Mixture, "mixture-capacity": lambda: Mixture(1.0)}


def mixtures(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [_mixture(*case) for case in cases]


def _mixture(name: str, num_experts: int, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    given = dict(sections)
    strategy = {"expert_parallel": num_experts, **given.pop("strategy", {})}
    engine, model, optimizer, loader = prepared(name, 1, stage, strategy=strategy, **given)
    found = steps(name, engine, model, optimizer, loader, plain_loss)
    found["weights"] = engine.get_state_dict(model)  # biases among them
    found["loads"] = [layer.moe.load.tolist() for layer in model.layers]
    engine.free_memory()
    return found


class Heard:
    """Telemetry that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.told.append((step, values))


def loads(name: str, num_experts: int) -> dict[str, Any]:
    """Train a step; return the load of each expert, and what telemetry is told of it."""
    engine, model, optimizer, loader = prepared(name, 1, 1, strategy={"expert_parallel": num_experts})
    loss = even_loss if name == "mixtral" else plain_loss
    steps(name, engine, model, optimizer, list(loader)[:1], loss)
    heard: Any = Heard()
    engine.expert_load.after_step([model], [optimizer], None, heard, 1, True)  # skipped: nothing to tell
    before = heard.told[:]
    engine.expert_load._mixtures[model] = []  # what was counted is not counted again
    engine.expert_load.after_step([model], [optimizer], None, heard, 1, False)
    found = {"load": distui.expert_load(model), "told": heard.told, "skipped": before}
    engine.free_memory()
    return found
