"""The models and optimizers of the parity matrix: each awkward in a way of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 37


class Block(nn.Module):
    """A block with a list of its own in it, an unused parameter, and odd sizes."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.ups = nn.ModuleList(nn.Linear(dim, inner) for _ in range(2))
        self.down = nn.Linear(inner, dim, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        normed_BTD = self.norm(x_BTD)
        return x_BTD + self.down(F.gelu(self.ups[0](normed_BTD)) * torch.tanh(self.ups[1](normed_BTD)))


class AwkwardModel(nn.Module):
    """Tied, frozen, unused, shared, integer and raw-read parameters, a buffer, a block called twice, uneven units."""

    def __init__(self) -> None:
        super().__init__()
        dim = 23
        self.embedding = nn.Embedding(VOCAB, dim)
        self.position = nn.Parameter(torch.randn(10, dim) * 0.1)
        self.blocks = nn.ModuleList(Block(dim, inner) for inner in (31, 5, 67))
        self.wide = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.wide[1].bias = self.wide[0].bias
        self.frozen = nn.Linear(dim, dim).requires_grad_(False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.integers = nn.Parameter(torch.arange(4), requires_grad=False)
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.randn(dim))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT) + self.position[: ids_BT.shape[1]]
        for index in (0, 1, 0, 2):
            x_BTD = self.blocks[index](x_BTD)
        for layer in self.wide:
            x_BTD = x_BTD + torch.tanh(layer(x_BTD))
        return self.head(self.norm(self.frozen(x_BTD) + self.offset.to(x_BTD.dtype)))


def llama(vocab_size: int, tied: bool = False) -> nn.Module:
    """Return transformers' Llama, tiny; `tied`: the head is the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(vocab_size: int) -> nn.Module:
    """Return transformers' GPT-2, tiny and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "awkward": AwkwardModel,
    "llama": partial(llama, VOCAB),
    "gpt2": partial(gpt2, VOCAB),
}


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().train()


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, a steep tanh for the sign, which flips where a gradient's last bit differs."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    average = self.state[param].setdefault("average", torch.zeros_like(param))
                    param.sub_(torch.tanh(100.0 * torch.lerp(param.grad, average, 0.9)), alpha=group["lr"])
                    average.lerp_(param.grad, 0.01)


class OwnMuon(torch.optim.Optimizer):
    """One optimizer with a group of matrices that it orthogonalises, and one of the rest that it steps like SGD."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                average.mul_(0.9).add_(param.grad)
                update = self._orthogonal(average) if group["orthogonal"] else average
                param.sub_(update, alpha=group["lr"])

    @staticmethod
    def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        x = matrix / (matrix.norm() + 1e-7)
        for _ in range(3):
            x = 1.5 * x - 0.5 * x @ x.T @ x
        return x


def make_optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    matrices = [param for param in trained.values() if param.dim() > 1]
    vectors = [param for param in trained.values() if param.dim() <= 1]
    inner = [param for key, param in trained.items() if param.dim() == 2 and _INNER.search(key)]
    rest = [param for param in trained.values() if not any(param is matrix for matrix in inner)]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=3e-3, eps=1e-6)]
    if name == "adam":
        return [torch.optim.Adam(trained.values(), lr=3e-3, amsgrad=True, eps=1e-6)]
    if name == "sgd":
        return [torch.optim.SGD(trained.values(), lr=0.05, momentum=0.9)]
    if name == "lion":
        return [Lion(trained.values(), lr=1e-3)]
    if name == "muon":
        return [torch.optim.Muon(inner, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, eps=1e-6, weight_decay=0.0)]
    assert name == "own_muon"
    groups = [{"params": inner, "orthogonal": True}, {"params": rest, "orthogonal": False}]
    return [OwnMuon(groups, {"lr": 0.02})]


_INNER = re.compile(r"blocks|layers|\.h\.")
OPTIMIZERS = ("adamw", "sgd", "adam", "lion", "muon", "own_muon")
