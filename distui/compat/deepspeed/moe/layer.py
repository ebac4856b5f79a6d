"""`deepspeed.moe.layer.MoE`: copies of a module as experts behind a gate of DeepSpeed's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from distui.compat.deepspeed.moe.experts import Experts, StackedExperts
from distui.compat.deepspeed.moe.gating import TopKGate
from distui.compat.not_offered import NotOffered

__all__ = ["Experts", "MOELayer", "MoE", "TopKGate", "expert_parallel_of"]


class MOELayer(nn.Module):
    """Gate and experts; `l_aux` and `exp_counts` are those of the last call."""

    def __init__(self, gate: TopKGate, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.l_aux: torch.Tensor | None = None
        self.exp_counts: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sum of each token's experts. Collective where these lie on several ranks."""
        x_SM = hidden_states.reshape(-1, hidden_states.shape[-1])
        routes = self.gate(x_SM, used_token)
        self.l_aux, self.exp_counts = routes.aux, routes.counts_E
        out_SM: torch.Tensor = self.experts(x_SM, routes.experts_SK, routes.weights_SK)
        return out_SM.view(hidden_states.shape)


class MoE(nn.Module):
    """A mixture of `num_experts` copies of `expert`.

    With `ep_size` 1 every rank has all experts, under DeepSpeed's names; with more `deepspeed.initialize` gives each of
    so many ranks its share (`strategy.expert_parallel`), and a parameter holds all experts, one behind another.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        """The arguments are DeepSpeed's. Raises: NotOffered for Tutel and experts cut over tensor-parallel ranks."""
        super().__init__()
        assert num_experts % ep_size == 0, (
            f"Number of experts ({num_experts}) should be divisible by expert parallel size ({ep_size})"
        )
        assert noisy_gate_policy in (None, "None", "Jitter", "RSample"), (
            f"Unsupported noisy_gate_policy: {noisy_gate_policy}"
        )
        for given, name in (
            (use_tutel, "use_tutel"),
            (enable_expert_tensor_parallelism, "enable_expert_tensor_parallelism"),
        ):
            if given:
                raise NotOffered(
                    f"deepspeed.moe.layer.MoE({name}=True) is not offered by distui",
                    "experts compute whole, with torch's own operations",
                    f"leave {name} out",
                )
        self.use_residual, self.ep_size, self.num_experts = use_residual, ep_size, num_experts
        self.num_local_experts = num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        experts: nn.Module = (
            Experts(expert, num_experts, self.expert_group_name)
            if ep_size == 1
            else StackedExperts(expert, num_experts, self.expert_group_name)
        )
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            top2_2nd_expert_sampling,
        )
        self.deepspeed_moe = MOELayer(gate, experts)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing: the engine makes the groups. Raises: NotOffered for another order of ranks."""
        if use_data_before_expert_parallel_:
            raise NotOffered(
                "use_data_before_expert_parallel_ is not offered by distui",
                "ranks that share experts are neighbours, so that tokens travel inside a node",
                "leave it out",
            )

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the output, the gate's loss of this rank's tokens, and how many chose each expert."""
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            by_mlp = self.mlp(hidden_states)
            by_mlp = by_mlp[0] if isinstance(by_mlp, tuple) else by_mlp
            weights = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * weights[..., 0:1] + by_mlp * weights[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


def expert_parallel_of(model: nn.Module) -> dict[str, int]:
    """Return the size of expert parallelism that the mixtures in `model` ask for, for `configuration.settle`.

    Raises: NotOffered where they ask for several.
    """
    sizes = {module.ep_size for module in model.modules() if isinstance(module, MoE)}
    if len(sizes) > 1:
        raise NotOffered(
            f"mixtures with ep_size {' and '.join(map(str, sorted(sizes)))} in one model are not offered by distui",
            "all layers' experts are shared among the same ranks",
            "give all the same ep_size",
        )
    size = max(sizes, default=1)
    return {"expert": size} if size > 1 else {}
