"""Trainings of the parity tests under tensor parallelism: the models, and five clipped steps on any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import distui

VOCAB, STEPS, ROWS = 37, 5, 4
MAX_NORM = 0.5


class Encoder(nn.Module):
    """torch's own encoder around nn.MultiheadAttention, with a padding mask, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 30, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids_BT), src_key_padding_mask=ids_BT == 0))


class Block(nn.Module):
    """Fused query-key-value of odd heads, gates in a list, a bias behind the sum, and a parameter that nobody uses."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.heads = 2
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ups = nn.ModuleList(nn.Linear(dim, inner) for _ in range(2))
        self.down = nn.Linear(inner, dim)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x_BTD)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.out(attended)
        return x_BTD + self.down(F.gelu(self.ups[0](x_BTD)) * torch.tanh(self.ups[1](x_BTD)))


class Awkward(nn.Module):
    """Frozen, unused and tied parameters, fused projections, uneven pieces, a block called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 18, padding_idx=20)
        self.blocks = nn.ModuleList(Block(18, inner) for inner in (31, 7))
        self.frozen = nn.Linear(18, 18).requires_grad_(False)
        self.norm = nn.LayerNorm(18)
        self.head = nn.Linear(18, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for index in (0, 1, 0):
            x_BTD = self.blocks[index](x_BTD)
        return self.head(self.norm(self.frozen(x_BTD)))


AWKWARD_PLAN = {
    "embedding": "embedding_rowwise",
    "blocks.*.qkv": "packed_colwise:3",
    "blocks.*.out": "rowwise",
    "blocks.*.heads": "divide",
    "blocks.*.ups.*": "colwise",
    "blocks.*.down": "rowwise",
    "frozen": "colwise_gather_output",
}


def _llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, max_position_embeddings=16, pad_token_id=0, eos_token_id=None, **sizes | more)
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none: dict[str, Any] = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=4, **none))


def _qwen3(moe: bool) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 27, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "eos_token_id": None,
    }  # fmt: skip
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    sizes |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes, **none))


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "ffn_dim": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dropout": 0.0,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=16, word_embed_proj_dim=16, **sizes))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {
        "d_model": 16,
        "decoder_start_token_id": 0,
        "d_kv": 4,
        "d_ff": 27,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True, num_key_value_heads=1),
    "gpt2": _gpt2,
    "qwen3": lambda: _qwen3(False),
    "qwen3-moe": lambda: _qwen3(True),
    "encoder": Encoder,
    "awkward": Awkward,
    "bert": _bert,
    "opt": _opt,
    "t5": _t5,
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().train()


def samples(rows: int = ROWS) -> list[torch.Tensor]:
    """Return sequences for steps of so many rows, over all data ranks."""
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(1, VOCAB, (rows * STEPS, 9), generator=generator))


def loss_of(name: str, model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    if name in ("encoder", "awkward"):
        return F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten())
    return model(input_ids=ids_BT, labels=ids_BT).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in params if param.dim() > 1]
    vectors = [param for param in params if param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, eps=1e-5)


def prepared(name: str, tensor: int, stage: int, **sections: Any) -> tuple[distui.Engine, Any, Any, Any]:
    """Return engine, model, optimizer and loader; every rank builds the model by a seed of its own."""
    strategy = {"tensor_parallel": tensor, "zero_stage": stage, **sections.pop("strategy", {})}
    engine = distui.Engine(strategy=strategy, **sections)
    model = build(name, engine.process_index)
    plan = AWKWARD_PLAN if name == "awkward" and tensor > 1 else None
    loader: Any = torch.utils.data.DataLoader(
        samples(),  # type: ignore[arg-type]
        batch_size=ROWS // engine.num_data_ranks,
    )
    model, optimizer, loader = engine.prepare(model, optimizer_of(model), loader, plan=plan)
    return engine, model, optimizer, loader


LossOf = Callable[[str, Any, torch.Tensor], torch.Tensor]


def steps(
    name: str, engine: distui.Engine, model: Any, optimizer: Any, loader: Any, loss_of: LossOf = loss_of
) -> dict[str, Any]:
    """Return losses, one each batch, and norms, one each step; on every rank the same."""
    losses, norms = [], []
    for ids_BT in loader:
        with engine.accumulate(model):
            loss = loss_of(name, model, ids_BT)
            engine.backward(loss)
            norm = engine.clip_grad_norm_(model.parameters(), MAX_NORM)
            if engine.sync_gradients:
                assert norm is not None
                norms.append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(engine.reduce(loss.detach(), "mean")))
    return {"losses": losses, "norms": norms}


def trained(
    name: str, engine: distui.Engine, model: Any, optimizer: Any, loader: Any, loss_of: LossOf = loss_of
) -> dict[str, Any]:
    """Return losses, norms and whole weights of a training."""
    found = steps(name, engine, model, optimizer, loader, loss_of)
    found["weights"] = engine.get_state_dict(model)
    engine.free_memory()
    return found


def train(name: str, tensor: int, stage: int, **sections: Any) -> dict[str, Any]:
    return trained(name, *prepared(name, tensor, stage, **sections))


def trainings(cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [train(*case) for case in cases]


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of two trainings, relative where numbers are large."""
    assert found["weights"].keys() == expected["weights"].keys()
    worst = 0.0
    for name, value in expected["weights"].items():
        assert found["weights"][name].shape == value.shape, name
        worst = max(
            worst, float((found["weights"][name].double() - value.double()).abs().max()) if value.numel() else 0.0
        )
    for kind in ("losses", "norms"):
        for mine, other in zip(found[kind], expected[kind], strict=True):
            worst = max(worst, abs(mine - other) / max(1.0, abs(other)))
    return worst
