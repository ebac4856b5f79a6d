"""torch's own attention and transformer layers over the heads of one rank.

`nn.MultiheadAttention` computes by a function that wants whole sizes, so the module's forward is one of ours: the same
projections, masks and dropout, over fewer heads.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distui.core.axes.cut import Cut, part_of
from distui.core.errors import UserError
from distui.core.parallel.regions import sum_of_all
from distui.core.parallel.styles import Cutting, divisors


def cut_attention(cutting: Cutting, module: nn.MultiheadAttention, name: str) -> None:
    """Cut the heads of `nn.MultiheadAttention`, and give it a forward for them."""
    num_heads, ranks, index = module.num_heads, cutting.num_ranks, cutting.index
    if num_heads % ranks:
        raise UserError(
            f"tensor_parallel={ranks} does not divide num_heads={num_heads} of {name}",
            "each rank attends with its heads",
            f"set strategy.tensor_parallel to {' or '.join(map(str, divisors(num_heads)))}",
        )
    for own in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if (param := module._parameters.get(own)) is not None:
            packed = 3 if own.startswith("in_proj") else 1
            cutting.cut(module, f"{name}.{own}", own, cutting.split(tuple(param.shape), 0, packed, f"{name}.{own}"))
    for own in ("bias_k", "bias_v"):
        if (param := module._parameters.get(own)) is not None:
            cutting.cut(module, f"{name}.{own}", own, cutting.split(tuple(param.shape), 2, 1, f"{name}.{own}"))
    out = module.out_proj
    shape = tuple(out.weight.shape)
    cutting.cut(out, f"{name}.out_proj.weight", "weight", Cut.split(shape, 1, ranks, index))
    module.num_heads = num_heads // ranks
    region, group, total = cutting.region, cutting.group, num_heads
    low, high = part_of(num_heads, ranks, index)

    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
        elif not self.batch_first:
            query, key, value = _transposed(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batch, length = query.shape[0], query.shape[1]
        q, k, v = _projected(self, *region.begin(name, query, key, value))
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = _mask(attn_mask, key_padding_mask, q, k, (total, low, high))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            probabilities = F.softmax(scores if mask is None else scores + mask, -1)
            probabilities = F.dropout(probabilities, dropout) if dropout else probabilities
            found, weights = probabilities @ v, probabilities
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        partial = F.linear(found.transpose(1, 2).reshape(batch, length, -1), self.out_proj.weight)
        region.end()
        output = sum_of_all(partial, group)
        if self.out_proj.bias is not None:
            output = output + self.out_proj.bias.to(output.dtype)
        if weights is not None:
            whole = weights.new_zeros(batch, total, *weights.shape[2:])
            weights = sum_of_all(torch.cat([whole[:, :low], weights, whole[:, high:]], 1), group)
            weights = weights.mean(1) if average_attn_weights else weights
        if unbatched:
            return output.squeeze(0), weights.squeeze(0) if weights is not None else None
        return output if self.batch_first else output.transpose(0, 1), weights

    region.ends_with(module)
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _transposed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Put the batch first; what is one tensor stays one, so that its gradients are summed once."""
    found: dict[int, torch.Tensor] = {}
    return [found.setdefault(id(x), x.transpose(0, 1)) for x in tensors]


def _projected(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None, None, None)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _mask(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    heads: tuple[int, int, int],
) -> torch.Tensor | None:
    """Return what is added to the scores [B, H, T, S] of this rank's heads; True in a mask of truth values hides."""
    batch, added = q.shape[0], None
    for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask, float("-inf"))
        mask = mask.to(q.dtype)
        if is_padding:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            total, low, high = heads
            mask = mask.view(batch, total, *mask.shape[1:])[:, low:high]
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # bias_k and zeros behind are seen
        added = mask if added is None else added + mask
    return added
