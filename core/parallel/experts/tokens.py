"""Which rank has which experts, and how a token comes to them.

transformers' experts are one module a layer, whose parameters have the experts as their first dimension and which is
called with the tokens, the experts of each, and their weights. Here every rank keeps its share of that dimension. A
call sorts the tokens by expert, sends each to the rank that has it, has the module's own forward compute there, as if
each had come with one expert, and brings the weighted results back, where a token's are added. No token is dropped.
Tensor-parallel ranks, which have the same tokens, send a part of them each, and give each other what comes back.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.cut import Cut, part_of
from distui.core.axes.groups import Axes
from distui.core.errors import UserError
from distui.core.parallel.experts.exchange import Exchange
from distui.core.parallel.experts.moe import Experts, MoE
from distui.core.parallel.regions import gather_rows, split_rows
from distui.core.sharding.cuts import MARK, Cuts, ExpertCuts
from distui.core.sharding.start.start import Start, refuse_trained
from distui.core.sharding.units.guarded import Refusal


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the modules of `model` that hold several experts in each of their parameters, with their names."""
    for name, module in model.named_modules():
        num_experts = getattr(module, "num_experts", None)
        own = [param for param in module._parameters.values() if param is not None]
        several = isinstance(num_experts, int) and num_experts > 1 and own
        holds = several and all(param.shape[:1] == (num_experts,) for param in own)
        if holds and (hasattr(module, "_is_expert_parallel") or _takes_routed_tokens(module)):
            yield name, module


def _takes_routed_tokens(module: nn.Module) -> bool:
    names = _argument_names(module)
    return len(names) == 3 and "ind" in names[1] and "weight" in names[2]


def _argument_names(module: nn.Module) -> list[str]:
    params = inspect.signature(module.forward).parameters.values()
    return [param.name for param in params if param.kind is param.POSITIONAL_OR_KEYWORD]


def expert_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that hold several experts, and of what is in them."""
    return frozenset(
        f"{name}.{inner}" if inner else name
        for name, module in experts_of(model)
        for inner in ("", *(own for own, _ in module.named_parameters()), *(own for own, _ in module.named_modules()))
    )


def spread_experts(model: nn.Module, axes: Axes, start: Start, beside: Cuts | None) -> tuple[Cuts, Exchange]:
    """Leave of each layer's experts this rank's share, in place; `beside` is what tensor-parallel ranks have cut.

    Collective: all ranks, with the same model. Raises: UserError on all ranks where there are none, or they do not
    divide.
    """
    group, pieces, stage = axes["ep"], axes["expert_pieces"], axes["stage"]
    assert group is not None and pieces is not None and stage is not None
    num_ranks, index = axes.size("ep"), axes.index("ep")
    cuts = Cuts(None, "expert-parallel ranks", ("expert_parallel", num_ranks), num_ranks)
    found = list(experts_of(model))
    if not found:
        raise UserError(
            f"expert_parallel={num_ranks}, and {type(model).__name__} has no experts that could be shared",
            "a layer's experts are one module with num_experts, parameters of which they are the first dimension, and "
            "forward(hidden_states, top_k_index, top_k_weights), as in transformers and distui.MoE",
            "set strategy.expert_parallel to 1: the ranks then are data-parallel",
        )
    refuse_trained(model)
    exchange = Exchange(group, axes["tp"])
    exchange.layers.update({name: number for number, (name, _) in enumerate(found)})
    for name, module in found:
        _cut(cuts, name, module, num_ranks, index)
    held = {id(param): param for _, module in found for param in module.parameters(recurse=False)}
    _refuse_ties(model, held, {id(module) for _, module in found})
    names = {id(param): name for name, param in model.named_parameters() if id(param) in held}
    refusal = Refusal(
        f"each of {num_ranks} ranks has its share of the experts, so this would be of that share, at another place "
        "than in the whole, and a loss of it would be averaged over ranks of which each knows its own",
        "engine.get_state_dict(model) gives whole weights, engine.gradients(model) whole gradients, and "
        "engine.clip_grad_norm_(model.parameters(), max_norm) their norm; for a penalty use weight decay, or set "
        "strategy.expert_parallel to 1",
        names,
    )
    cuts.experts = ExpertCuts(frozenset(held), pieces, axes["expert_shard"], stage, refusal)
    start.cut(list(held.values()), cuts)
    for param in held.values():
        vars(param)[MARK] = True
    for name, module in found:
        module.forward = Spread(module, name, exchange, refusal)
        module.num_experts //= num_ranks
    if beside is not None:
        beside.of.update(cuts.of)
        beside.experts, cuts = cuts.experts, beside
    return cuts, exchange


def _cut(cuts: Cuts, name: str, module: Any, num_ranks: int, index: int) -> None:
    if module.num_experts % num_ranks:
        fitting = [size for size in range(1, module.num_experts + 1) if module.num_experts % size == 0]
        raise UserError(
            f"expert_parallel={num_ranks} does not divide the {module.num_experts} experts of {name}",
            "every rank holds as many",
            f"set strategy.expert_parallel to {' or '.join(map(str, fitting))}",
        )
    inner = [one for one in module.named_parameters() if "." in one[0]]
    for own, tensor in [*inner, *module.named_buffers()]:
        if tensor.shape[:1] == (module.num_experts,):
            raise UserError(
                f"{name}.{own} seems to be of {module.num_experts} experts, and stays whole on every rank",
                "a rank's share of the experts is counted from 0, so each would take another's",
                f"make it a parameter of {name} itself, or set strategy.expert_parallel to 1",
            )
    for param in module.parameters(recurse=False):
        cuts.of[id(param)] = Cut.split(tuple(param.shape), 0, num_ranks, index)


def _refuse_ties(model: nn.Module, held: dict[int, nn.Parameter], modules: set[int]) -> None:
    for name, module in model.named_modules():
        for own, param in module._parameters.items():
            if param is not None and id(param) in held and id(module) not in modules:
                raise UserError(
                    f"{name}.{own} is tied to the experts of another module",
                    "a rank keeps its share of the experts, and this module would compute with that",
                    "give the module a parameter of its own, or set strategy.expert_parallel to 1",
                )


class Spread:
    """The forward of one layer's experts, of which other ranks have the rest."""

    def __init__(self, module: Any, name: str, exchange: Exchange, refusal: Refusal) -> None:
        """Take the place of the forward of `module`, which still has all experts by its `num_experts`.

        Inside `refusal` is lifted: nobody else reads the parameters.
        """
        self.module, self.name, self.exchange, self.refusal = module, name, exchange, refusal
        self.own_forward = module.forward
        self._names = _argument_names(module)
        self.num_experts = module.num_experts
        self.num_local = module.num_experts // exchange.num_ranks
        self.load: list[int] | None = None
        """Tokens that each of all experts got in the last forward, of the ranks that share them."""

    @torch.compiler.disable  # how many rows come is known to nobody before they do
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the sum of each token's weighted experts. Collective: all ranks that share the experts."""
        rest = self._names[len(args) :]
        given = (*args, *(kwargs[name] for name in rest)) if sorted(kwargs) == sorted(rest) else ()
        if len(given) != 3 or not all(isinstance(value, torch.Tensor) for value in given):
            raise self._refusal(f"it was called with {len(args)} arguments and {', '.join(kwargs) or 'no keywords'}")
        hidden, index, weights = given
        if index.is_floating_point() or weights.shape != index.shape or hidden.shape[:-1].numel() != len(_rows(index)):
            shapes = ", ".join(str(list(value.shape)) for value in given)
            raise self._refusal(f"it was called with tensors of {shapes}, no tokens with their experts and weights")
        return self._forward(_rows(hidden), _rows(index), _rows(weights)).view(hidden.shape)

    def _forward(self, tokens_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return what all experts give; of tensor-parallel ranks each sends its part of the tokens, which all have."""
        if (group := self.exchange.alike) is None:
            return self._routed(tokens_TD, index_TK, weights_TK)
        low, high = part_of(len(tokens_TD), dist.get_world_size(group), dist.get_rank(group))
        own_TD, own_TK = split_rows(tokens_TD, group), split_rows(weights_TK, group)
        return gather_rows(self._routed(own_TD, index_TK[low:high], own_TK), len(tokens_TD), group)

    def _routed(self, tokens_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Legend: T tokens, K experts of each, N = T x K pairs of both, D features."""
        exchange, num_local = self.exchange, self.num_local
        comes_back = torch.is_grad_enabled()
        with torch.no_grad():
            # Models say num_experts for no expert at all; such pairs stay here, behind all others.
            experts_N = index_TK.reshape(-1).clamp(max=self.num_experts)
            order_N = torch.argsort(experts_N, stable=True)
            numbers = torch.bincount(experts_N, minlength=self.num_experts + 1)[: self.num_experts]
            counts = exchange.counts(numbers, self.name, comes_back)
            self.load = [sum(of_ranks) for of_ranks in zip(*counts, strict=True)]
            sizes_out = _by_rank(counts[exchange.rank], num_local)
            here = slice(exchange.rank * num_local, (exchange.rank + 1) * num_local)
            sizes_in = [sum(of_rank[here]) for of_rank in counts]
            num_rows = sum(map(sum, counts))
            sent_N = order_N[: sum(sizes_out)]
            came = torch.tensor([of_rank[here] for of_rank in counts], device=tokens_TD.device).reshape(-1)
            local = torch.arange(num_local, device=tokens_TD.device).repeat(exchange.num_ranks)
            local_experts = local.repeat_interleave(came, output_size=sum(sizes_in))
        rows, weights = exchange.send(
            (tokens_TD[sent_N // index_TK.shape[1]], weights_TK.reshape(-1)[sent_N].unsqueeze(1)),
            sizes_out,
            sizes_in,
            num_rows,
        )
        with self.refusal.lifted():
            computed = self._compute(rows, local_experts.unsqueeze(1), weights).to(rows.dtype)
        (back,) = exchange.send((computed,), sizes_in, sizes_out, num_rows)
        pairs_ND = back.new_zeros(len(order_N), back.shape[1]).index_copy(0, sent_N, back)
        return pairs_ND.view(*index_TK.shape, back.shape[1]).sum(1).to(tokens_TD.dtype)

    def _compute(self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if len(rows):
            found: torch.Tensor = self.own_forward(rows, index, weights)
            return found
        # A rank without tokens has gradients of zero, as soon as the others have theirs: they wait for its sums.
        params = [param for param in self.module.parameters() if param.requires_grad]
        return _Unused.apply(rows * weights, *params) if params and torch.is_grad_enabled() else rows * weights

    def _refusal(self, why: str) -> UserError:
        return UserError(
            f"the experts {self.name} cannot be shared among {self.exchange.num_ranks} ranks",
            why,
            "expected are hidden_states, top_k_index and top_k_weights; set strategy.expert_parallel to 1",
        )


class _Unused(torch.autograd.Function):
    """Hands rows through, and gives each parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.kinds = [(param.shape, param.dtype, param.device) for param in params]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


def _rows(of_pairs: torch.Tensor) -> torch.Tensor:
    return of_pairs.reshape(math.prod(of_pairs.shape[:-1]), of_pairs.shape[-1])


def _by_rank(counts: list[int], num_local: int) -> list[int]:
    return [sum(counts[at : at + num_local]) for at in range(0, len(counts), num_local)]


def expert_load(model: nn.Module) -> dict[str, list[int]]:
    """Return how many tokens each expert got, by the layer's name, of the layers that count them.

    Of `distui.MoE` in the last step, over all ranks; of experts that `strategy.expert_parallel` shares in the last
    forward, over the ranks that share them. On a GPU the host waits for the former.
    """
    found: dict[str, list[int] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            found[name] = None if module.load is None else module.load.tolist()
        elif isinstance(spread := vars(module).get("forward"), Spread) and not isinstance(module, Experts):
            found[name] = spread.load
    return {name: load for name, load in found.items() if load is not None}
