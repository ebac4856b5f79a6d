"""Which experts a token passes, as DeepSpeed's gates choose: top 1, 2 and k, capacities, random selection, aux loss.

Legend of shapes: S tokens, E experts, K experts a token, M features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

JITTER = 1e-2


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens of one call go."""

    experts_SK: torch.Tensor
    """The number of experts stands for none: a choice over an expert's capacity."""
    weights_SK: torch.Tensor
    aux: torch.Tensor
    counts_E: torch.Tensor
    """Tokens that chose each expert, before any was dropped."""


class TopKGate(nn.Module):
    """A router: `wg` scores the experts of each token in fp32."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        """The arguments are those of DeepSpeed's MoE."""
        super().__init__()
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.k, self.num_experts, self.min_capacity = k, num_experts, min_capacity
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.noisy_gate_policy, self.drop_tokens, self.use_rts = noisy_gate_policy, drop_tokens, use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def forward(self, x_SM: torch.Tensor, used_token: torch.Tensor | None = None) -> Routes:
        """Return the routes of the tokens; `used_token` [S] is 0 for tokens that pass no expert (top 1)."""
        x_SM = x_SM.float()
        if self.noisy_gate_policy == "Jitter" and self.training:
            x_SM = x_SM * _uniform(x_SM.shape, x_SM.device, 1.0 - JITTER, 1.0 + JITTER)
        logits_SE = F.linear(x_SM, self.wg.weight.float())
        if self.k == 1:
            return self._top1(logits_SE, used_token)
        return self._top2(logits_SE) if self.k == 2 else self._topk(logits_SE)

    def _capacity(self, num_tokens: int) -> int:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        # fp32, as DeepSpeed multiplies: the ceiling of another product may be another number.
        share = torch.tensor(num_tokens / self.num_experts) * torch.tensor(factor * self.k)
        return max(math.ceil(float(share)), self.min_capacity)

    def _top1(self, logits_SE: torch.Tensor, used_token: torch.Tensor | None) -> Routes:
        num_tokens = len(logits_SE)
        scores_SE = logits_SE
        if self.noisy_gate_policy == "RSample" and self.training:
            scores_SE = logits_SE + _gumbel(logits_SE)
        gates_SE = logits_SE.softmax(1)
        chosen = scores_SE is not logits_SE
        index_S = (scores_SE if chosen else gates_SE).argmax(1)
        mask_SE = F.one_hot(index_S, self.num_experts)
        if used_token is not None:
            mask_SE = used_token[:, None] * mask_SE
        counts_E = mask_SE.sum(0).detach()
        aux = (gates_SE.mean(0) * mask_SE.float().mean(0)).sum() * self.num_experts
        capacity = self._capacity(num_tokens) if self.drop_tokens else min(int(counts_E.max()), num_tokens)
        order_SE = mask_SE * _uniform(mask_SE.shape, mask_SE.device) if self.use_rts else mask_SE
        assert num_tokens >= self.min_capacity, (
            "No. of tokens (batch-size) should be greater than min_capacity. Either set min_capacity to 0 or increase "
            "your batch size."
        )
        kept = order_SE.topk(min(capacity, num_tokens), dim=0).indices
        mask_SE = mask_SE * torch.zeros_like(mask_SE).scatter_(0, kept, 1)
        weights_S = (gates_SE * mask_SE).sum(1)
        experts_S = torch.where(mask_SE.sum(1) > 0, index_S, self.num_experts)
        return Routes(experts_S[:, None], weights_S[:, None], aux, counts_E)

    def _top2(self, logits_SE: torch.Tensor) -> Routes:
        gates_SE = logits_SE.softmax(1)
        first_S = gates_SE.argmax(1)
        first_SE = F.one_hot(first_S, self.num_experts)
        if self.top2_2nd_expert_sampling:
            logits_SE = logits_SE + _gumbel(logits_SE)
        second_S = logits_SE.masked_fill(first_SE.bool(), float("-inf")).argmax(1)
        second_SE = F.one_hot(second_S, self.num_experts)
        places = first_SE.cumsum(0) - 1, second_SE.cumsum(0) - 1 + first_SE.sum(0, keepdim=True)
        aux = (gates_SE.mean(0) * first_SE.float().mean(0)).mean() * self.num_experts**2
        counts_E = (first_SE + second_SE).sum(0).detach()
        masks = [first_SE, second_SE]
        if self.drop_tokens:
            capacity = self._capacity(len(gates_SE))
            masks = [mask * (place < capacity) for mask, place in zip(masks, places, strict=True)]
        weights_SK = torch.stack([(gates_SE * mask).sum(1) for mask in masks], 1)
        weights_SK = weights_SK / weights_SK.sum(1, keepdim=True).clamp(min=torch.finfo(weights_SK.dtype).eps)
        chosen = zip(masks, (first_S, second_S), strict=True)
        experts_SK = torch.stack([torch.where(mask.any(1), index, self.num_experts) for mask, index in chosen], 1)
        return Routes(experts_SK, weights_SK, aux, counts_E)

    def _topk(self, logits_SE: torch.Tensor) -> Routes:
        gates_SE = logits_SE.softmax(1)
        top_SK, index_SK = gates_SE.topk(self.k, dim=1)
        mask_SE = torch.zeros_like(gates_SE, dtype=torch.bool).scatter_(1, index_SK, True)
        counts_E = mask_SE.sum(0).detach()
        aux = (gates_SE.mean(0) * mask_SE.float().mean(0)).mean() * self.num_experts**2 / self.k
        if self.drop_tokens:
            # Of an expert's tokens those stay that score it highest.
            scores_SE = torch.zeros_like(gates_SE).scatter(1, index_SK, top_SK)
            most = min(self._capacity(len(gates_SE)), len(gates_SE))
            kept = scores_SE.topk(most, dim=0, sorted=False).indices
            mask_SE = mask_SE & torch.zeros_like(mask_SE).scatter_(0, kept, True)
        gates_SE = gates_SE * mask_SE
        gates_SE = gates_SE / gates_SE.sum(-1, keepdim=True).clamp(min=torch.finfo(gates_SE.dtype).eps)
        experts_SK = torch.where(mask_SE.gather(1, index_SK), index_SK, self.num_experts)
        return Routes(experts_SK, gates_SE.gather(1, index_SK), aux, counts_E)


def _uniform(shape: torch.Size, device: torch.device, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(shape, device=device) * (high - low) + low


def _gumbel(logits_SE: torch.Tensor) -> torch.Tensor:
    zero, one = torch.tensor(0.0, device=logits_SE.device), torch.tensor(1.0, device=logits_SE.device)
    return torch.distributions.gumbel.Gumbel(zero, one).rsample(logits_SE.shape)
