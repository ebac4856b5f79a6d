"""A small decoder-only language model over bytes.

Shapes: B batch, T positions, D model width, H heads, K width of a head, V the 256 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256


class Output(NamedTuple):
    """What the model returns; the loss only where it got labels."""

    loss: torch.Tensor | None
    """Mean cross entropy, in nats a byte, float32."""
    logits: torch.Tensor
    """`[B, T, V]`"""


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the stream, `[B, T, D]`, after this block."""
        qkv_BT3HK = self.qkv(self.attention_norm(x_BTD)).unflatten(-1, (3, self.num_heads, -1))
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.attention_out(y_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BTD))))


class ByteGPT(nn.Module):
    """A GPT whose tokens are bytes; the output layer shares its weight with the token embedding."""

    def __init__(self, num_layers: int = 4, dim: int = 128, num_heads: int | None = None, context: int = 128) -> None:
        """`num_heads` unset gives heads of 32, or one where `dim` is no multiple of 32."""
        super().__init__()
        num_heads = num_heads or (dim // 32 if dim % 32 == 0 else 1)
        self.token_embedding = nn.Embedding(VOCABULARY, dim)
        self.position_embedding = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        self.apply(self._init_weights)
        # The residual stream adds 2 terms a layer: scaled, its variance does not grow with depth (GPT-2, section 2.3).
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention_out, block.mlp_out):
                nn.init.normal_(layer.weight, std=0.02 * (2 * num_layers) ** -0.5)
        self.lm_head.weight = self.token_embedding.weight

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        """Return the logits of each next byte, and with `labels` the loss.

        Shapes: input_ids and labels `[B, T]`; labels are the bytes that follow, not shifted here.
        """
        positions_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        x_BTD = self.token_embedding(input_ids) + self.position_embedding(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.lm_head(self.final_norm(x_BTD))
        if labels is None:
            return Output(None, logits_BTV)
        return Output(F.cross_entropy(logits_BTV.float().flatten(0, 1), labels.flatten()), logits_BTV)
