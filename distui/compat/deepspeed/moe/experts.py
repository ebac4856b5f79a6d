"""Copies of one module as experts: side by side as DeepSpeed names them, or in parameters that ranks can share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from distui.compat.not_offered import NotOffered


def _mark(params: Any, group_name: str) -> None:
    for param in params:
        param.allreduce, param.group_name = False, group_name


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output  # DeepSpeed leaves a bias out too
    return found


class Experts(nn.Module):
    """Every expert a module, called with the tokens that are routed to it."""

    def __init__(self, expert: nn.Module, num_local_experts: int = 1, expert_group_name: str | None = None) -> None:
        """All begin as copies of `expert`."""
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_local_experts))
        self.num_local_experts = num_local_experts
        _mark(self.deepspeed_experts.parameters(), expert_group_name or "ep_size_1")

    @torch.compiler.disable  # shapes depend on the tokens of each expert
    def forward(self, x_SM: torch.Tensor, experts_SK: torch.Tensor, weights_SK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, added in fp32; an expert without tokens is called too."""
        total_SM = torch.zeros_like(x_SM, dtype=torch.float32)
        for number, expert in enumerate(self.deepspeed_experts):
            token, choice = torch.where(experts_SK == number)
            out = _first(expert(x_SM[token]))
            total_SM = total_SM.index_add(0, token, out.float() * weights_SK[token, choice, None])
        return total_SM.to(x_SM.dtype)


class StackedExperts(nn.Module):
    """The same in parameters [experts, ...], of which `strategy.expert_parallel` gives each rank its share."""

    def __init__(self, expert: nn.Module, num_experts: int, expert_group_name: str) -> None:
        """Raises: NotOffered for an expert with buffers, which would be one for all."""
        super().__init__()
        if (name := next((name for name, _ in expert.named_buffers()), None)) is not None:
            raise NotOffered(
                f"deepspeed.moe.layer.MoE with ep_size > 1 and an expert that has the buffer {name} is not offered",
                "experts that ranks share lie in parameters whose first dimension counts them",
                "give the expert no buffers, or set ep_size to 1",
            )
        self.num_experts = num_experts
        self._names = {name: name.replace(".", "__") for name, _ in expert.named_parameters()}
        for name, param in expert.named_parameters():
            stacked = param.detach().expand(num_experts, *param.shape).clone()
            self.register_parameter(self._names[name], nn.Parameter(stacked, param.requires_grad))
        _mark(self.parameters(), expert_group_name)
        self._expert = [copy.deepcopy(expert).to("meta")]  # in a list: its parameters are none of this module's

    @torch.compiler.disable
    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts. Shapes: hidden [S, M], both others [S, K]."""
        expert = self._expert[0].train(self.training)
        total_SM = torch.zeros_like(hidden, dtype=torch.float32)
        for number in range(self.num_experts):
            own = {name: getattr(self, stacked)[number] for name, stacked in self._names.items()}
            token, choice = torch.where(top_k_index == number)
            out = _first(torch.func.functional_call(expert, own, (hidden[token],)))
            total_SM = total_SM.index_add(0, token, out.float() * top_k_weights[token, choice, None])
        return total_SM.to(hidden.dtype)
