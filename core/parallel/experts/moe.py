"""`distui.MoE`: a mixture of experts for anybody's model, on one process, data-parallel ranks, or experts over ranks.

Legend of shapes: B any leading dimensions, D features, T tokens, K experts a token, N = T x K pairs of both, E experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class MoE(nn.Module):
    """A feed-forward layer of several experts, of which each token passes `top_k`.

    A router scores the experts of each token; the output is the sum of the best, weighted by their scores. With
    `balance_rate` a bias on each expert's score moves after every step against its load, and has no part in the
    weights (arXiv 2408.15664): experts come to be used alike without a loss that pulls at the model. The engine does
    it; without one, call `balance_experts(model)` after `optimizer.step()`.

    No token is dropped, unless `capacity_factor` is set: then an expert takes `ceil(capacity_factor * T * K / E)` of
    the tokens of one rank's forward, first choices first, earlier tokens first; what is over passes the other experts
    alone (GShard, arXiv 2006.16668, section 2.2).

    With `strategy.expert_parallel` each rank holds its share of the experts, and tokens travel. The script is the same.

    Shapes: [B, D] in and out.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        num_experts: int,
        top_k: int = 2,
        *,
        shared_inner: int = 0,
        activation: str = "silu",
        gated: bool = True,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        balance_rate: float = 1e-3,
        capacity_factor: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """`inner` is each expert's inner size, `shared_inner` that of one that every token passes (0: there is none).

        `scores` is over all experts (softmax) or of each alone (sigmoid); with `normalize` the weights of a token's
        experts sum to 1, times `scale`. `balance_rate` 0 leaves the biases as they are.

        Raises: UserError for sizes that do not fit.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserError(
                f"top_k={top_k} of {num_experts} experts",
                "every token passes top_k different experts",
                f"set top_k between 1 and {num_experts}",
            )
        if activation not in ACTIVATIONS or scores not in ("softmax", "sigmoid"):
            raise UserError(
                f"activation={activation!r} and scores={scores!r} of MoE",
                f"known are {', '.join(ACTIVATIONS)}, and softmax and sigmoid",
                "set one of them",
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise UserError(
                f"capacity_factor={capacity_factor}",
                "it is how many of the tokens that come in the mean an expert takes",
                "set it above 0, such as 1.25, or leave it None: then no token is dropped",
            )
        self.num_experts, self.top_k, self.scores, self.normalize = num_experts, top_k, scores, normalize
        self.scale, self.balance_rate, self.capacity_factor = scale, balance_rate, capacity_factor
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = nn.Linear(dim, num_experts, bias=False, **kind)
        self.experts = Experts(num_experts, dim, inner, activation, gated, **kind)
        self.shared = Experts(1, dim, shared_inner, activation, gated, **kind) if shared_inner else None
        self.bias: torch.Tensor
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.load: torch.Tensor | None = None
        """Tokens that each expert was chosen by in the last step, over all ranks, [E]; None before the first."""
        self._counted: torch.Tensor | None = None
        """Those of this rank since the last step."""

    def reset_parameters(self) -> None:
        """Forget the biases; the parts have their own."""
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return each token's experts' sum. Shapes: [B, D]. Collective where experts lie on several ranks."""
        hidden_TD = x.reshape(-1, x.shape[-1])
        index_TK, weights_TK = self.route(hidden_TD)
        out_TD: torch.Tensor = self.experts(hidden_TD, index_TK, weights_TK.to(x.dtype))
        if self.shared is not None:
            every = torch.zeros_like(index_TK[:, :1])
            out_TD = out_TD + self.shared(hidden_TD, every, torch.ones_like(every, dtype=x.dtype))
        return out_TD.view(x.shape)

    def route(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts of each token, `num_experts` for a choice that was over an expert's capacity, and weights.

        Shapes: two of [T, K]. The scores are computed in fp32.
        """
        logits_TE = F.linear(hidden_TD.float(), self.gate.weight.float())
        scores_TE = logits_TE.softmax(-1) if self.scores == "softmax" else logits_TE.sigmoid()
        index_TK = (scores_TE.detach() + self.bias).topk(self.top_k, -1).indices
        weights_TK = scores_TE.gather(1, index_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        # A recomputation in backward chooses the same once more.
        if self.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            counts_E = torch.bincount(index_TK.reshape(-1), minlength=self.num_experts)
            self._counted = counts_E if self._counted is None else self._counted + counts_E
        if self.capacity_factor is not None:
            index_TK = self._within_capacity(index_TK)
        return index_TK, weights_TK * self.scale

    def _within_capacity(self, index_TK: torch.Tensor) -> torch.Tensor:
        assert self.capacity_factor is not None
        most = math.ceil(self.capacity_factor * index_TK.numel() / self.num_experts)
        choices_N = index_TK.t().reshape(-1)  # all first choices, then all second ones
        order = choices_N.argsort(stable=True)
        counts_E = torch.bincount(choices_N, minlength=self.num_experts)
        begins_E = counts_E.cumsum(0) - counts_E
        places_N = torch.empty_like(order)
        places_N[order] = torch.arange(len(order), device=order.device) - begins_E[choices_N[order]]
        kept_N = choices_N.masked_fill(places_N >= most, self.num_experts)
        return kept_N.view(self.top_k, -1).t().contiguous()

    def take_counts(self) -> torch.Tensor:
        """Return the tokens that chose each expert on this rank since the last call, [E], and begin anew."""
        counted, self._counted = self._counted, None
        return self.bias.new_zeros(self.num_experts, dtype=torch.int64) if counted is None else counted

    def take_load(self, load_E: torch.Tensor) -> None:
        """Move each bias against the load of its expert, which is that of all ranks. Shapes: [E]."""
        self.load = load_E
        if self.balance_rate:
            load = load_E.float()
            self.bias += self.balance_rate * (load.mean() - load).sign()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.bias = self.bias.float()  # small steps are lost in other formats
        return self

    def extra_repr(self) -> str:
        """Return what the printed model says of it."""
        capacity = "" if self.capacity_factor is None else f", capacity_factor={self.capacity_factor}"
        return f"num_experts={self.num_experts}, top_k={self.top_k}, balance_rate={self.balance_rate}{capacity}"


class Experts(nn.Module):
    """Feed-forward layers side by side: what `strategy.expert_parallel` shares among ranks."""

    def __init__(
        self, num_experts: int, dim: int, inner: int, activation: str, gated: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.num_experts, self.activation, self.gated = num_experts, activation, gated
        width = 2 * inner if gated else inner
        self.up = nn.Parameter(torch.empty(num_experts, width, dim, device=device, dtype=dtype))
        """Of gated experts the gates first, then what they weigh."""
        self.down = nn.Parameter(torch.empty(num_experts, dim, inner, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert as nn.Linear draws its weight."""
        for weight in (self.up, self.down):
            bound = 1.0 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    @torch.compiler.disable  # shapes depend on the tokens of each expert
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return for each token the weighted sum of its experts; an index of `num_experts` is none.

        Shapes: hidden [T, D], index and weights [T, K], out [T, D].
        """
        num_tokens, num_choices = index.shape
        chosen_N = index.reshape(-1)
        order = chosen_N.argsort(stable=True)
        counts_E = torch.bincount(chosen_N, minlength=self.num_experts + 1)[: self.num_experts]
        if _grouped_works(hidden.device, hidden.dtype) and self._is_aligned:
            ends = counts_E.cumsum(0)
            # Rows behind the last end are not computed, and would hold whatever was there.
            order, rest = order[: int(ends[-1])], len(order)
            rows = hidden[order // num_choices]
            offsets = ends.to(torch.int32)
            inner = self._act(F.grouped_mm(rows, self.up.transpose(1, 2), offs=offsets))
            out = F.grouped_mm(inner, self.down.transpose(1, 2), offs=offsets)
        else:
            counts = counts_E.tolist()
            order, rest = order[: sum(counts)], len(order)
            parts = hidden[order // num_choices].split(counts)
            out = torch.cat([self._one(expert, part) for expert, part in enumerate(parts)])
        out = out * weights.reshape(-1)[order].unsqueeze(1)
        pairs = out.new_zeros(rest, out.shape[1]).index_copy(0, order, out)
        return pairs.view(num_tokens, num_choices, out.shape[1]).sum(1)

    def _one(self, expert: int, part: torch.Tensor) -> torch.Tensor:
        return F.linear(self._act(F.linear(part, self.up[expert])), self.down[expert])

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(x)
        gates, values = x.chunk(2, -1)
        return act(gates) * values

    @property
    def _is_aligned(self) -> bool:
        return all(size * self.up.element_size() % 16 == 0 for size in (*self.up.shape[1:], self.down.shape[2]))

    def extra_repr(self) -> str:
        """Return what the printed model says of it."""
        return f"{self.num_experts} x [{self.down.shape[1]} -> {self.down.shape[2]}], {self.activation}"


@functools.cache
def _grouped_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this torch multiplies groups of rows by a matrix each, on this device and in this format."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        with torch.no_grad():
            rows, weights = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(2, 16, 16, device=device)
            offsets = torch.tensor([0, 16], dtype=torch.int32, device=device)
            found = F.grouped_mm(rows, weights.to(dtype).transpose(1, 2), offs=offsets)
            return bool((found == 16).all())
    except (RuntimeError, NotImplementedError):
        return False


def mixtures_of(model: nn.Module) -> list[tuple[str, MoE]]:
    """Return the mixtures in `model`, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]


def balance_experts(model: nn.Module | Iterable[MoE], group: dist.ProcessGroup | None = None) -> None:
    """After an optimizer step: move the mixtures' biases by the load of all ranks, which `MoE.load` then is.

    The engine does it in every step; call it where there is none. `group` are the ranks whose tokens count, by default
    all of torch.distributed. Collective: these ranks.
    """
    mixtures = [mixture for _, mixture in mixtures_of(model)] if isinstance(model, nn.Module) else list(model)
    if not mixtures:
        return
    with torch.no_grad():
        counts = torch.cat([mixture.take_counts() for mixture in mixtures])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(counts, group=group)
        for mixture, load_E in zip(mixtures, counts.split([one.num_experts for one in mixtures]), strict=True):
            mixture.take_load(load_E)
