"""Tensor parallelism: a model's parameters are cut in place by its plan, and its modules compute with their pieces."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.axes.groups import Axes
from distui.core.axes.tensors import put, take
from distui.core.errors import UserError
from distui.core.parallel.attention import cut_attention
from distui.core.parallel.batches import LOOKED_AT, compare_batch
from distui.core.parallel.plans import plan_of
from distui.core.parallel.regions import Region
from distui.core.parallel.stream import Stream
from distui.core.parallel.styles import STYLES, Cutting, Rule, divide, divisors, parameter
from distui.core.sharding.cuts import MARK, Cuts
from distui.core.sharding.hooks import Hook
from distui.core.sharding.start.start import Start, refuse_trained
from distui.core.sharding.transport.alike import check_alike

_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")


def cut_model(
    model: nn.Module,
    axes: Axes,
    start: Start,
    text: str,
    given: Mapping[str, str],
    elsewhere: Collection[str] = (),
    along_sequence: bool = False,
) -> Cuts | None:
    """Cut `model` in place for this rank, by the user's plan (`text`, `given`) or one that is known.

    What the plan says of modules and parameters in `elsewhere` is left out: they will be other ranks' own. With
    `along_sequence` the hidden state is cut along the sequence outside of attention and feed-forward.

    Collective: all ranks, with the same model. Returns which parameters are cut; None where one rank has the batch.

    Raises: UserError on all ranks where there is no plan, or it does not fit the sizes; the model may then be half cut.
    """
    group = axes["tp"]
    if group is None:
        return None
    check_alike(model, dist.group.WORLD)  # type: ignore[arg-type]
    refuse_trained(model)
    region = Region(group)
    cutting = Cutting(group, region, axes.index("tp"), axes.size("tp"))
    plan = {name: style for name, style in plan_of(model, text, given).items() if name not in elsewhere}
    modules = dict(model.named_modules(remove_duplicate=False))
    stream = Stream(model, plan, elsewhere, cutting.num_ranks) if along_sequence else None
    for name, style in plan.items():
        kind, _, number = style.partition(":")
        outer, _, own = name.rpartition(".")
        if style == "divide":
            divide(cutting, modules[outer], own, name)
        elif style == "attention":
            attention = modules[name]
            assert isinstance(attention, nn.MultiheadAttention)
            cut_attention(cutting, attention, name)
        elif name in modules:
            packed = int(number) if number else 2 if kind == "packed_colwise" else 1
            num_heads = _num_heads(cutting, modules, plan, name) if packed == 1 else 0
            rule = Rule(kind, packed, outer, num_heads, stream is not None and stream.insides.get(outer, False))
            STYLES[kind](cutting, modules[name], name, rule)
            region.ends_with(_called_around(modules, outer))
        else:
            parameter(cutting, modules[outer], own, name, Rule(kind, int(number or 1 + kind.startswith("packed"))))
    _cut_ties(cutting, modules)
    if stream is not None:
        stream.install(cutting)
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False  # its layers take plain tensors
    cuts = Cuts(group)
    cuts.of = {number: cut for number, (_, _, cut) in cutting.cuts.items()}
    start.cut([param for _, param, _ in cutting.cuts.values()], cuts)
    named = model.named_parameters()
    whole = [param for name, param in named if id(param) not in cuts.of and name not in elsewhere]
    start.share([*whole, *model.buffers()], cuts)
    for _, param, _ in cutting.cuts.values():
        vars(param)[MARK] = True
    for _, param, cut in cutting.partial:
        _sum_gradient(param, cut, group)
    _watch(model, region)
    return cuts


def _called_around(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the module `name`, or where that is but a list, the one around it."""
    while isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return modules[name]


def _num_heads(cutting: Cutting, modules: Mapping[str, nn.Module], plan: Mapping[str, str], name: str) -> int:
    """Return the heads in the output of a projection of attention, 0 of any other; refuse numbers that do not fit."""
    if plan[name] != "colwise":
        return 0
    outer = name.rpartition(".")[0]
    parent, module = modules[outer], modules[name]
    size = next((getattr(parent, key) for key in _HEAD_SIZES if isinstance(getattr(parent, key, None), int)), 0)
    beside = [
        _features(modules[other])
        for other, style in plan.items()
        if style == "colwise" and other in modules and other.rpartition(".")[0] == outer
    ]
    own = _features(module)
    if not size or any(features % size for features in beside):
        return 0
    ranks, queries, heads = cutting.num_ranks, max(beside) // size, own // size
    if queries % ranks or (heads % ranks and (ranks % heads or not hasattr(parent, "num_key_value_groups"))):
        raise UserError(
            f"tensor_parallel={ranks} does not fit the {heads} heads of {name}",
            f"{queries} heads of queries and {heads} of this in {size} features each; every rank needs as many",
            f"set strategy.tensor_parallel to {' or '.join(map(str, _fitting(queries, min(beside) // size)))}",
        )
    if heads < ranks:  # each rank has one, which others share
        vars(parent)["num_key_value_groups"] = queries // ranks
    return heads


def _features(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None else 0


def _fitting(queries: int, shared: int) -> list[int]:
    return [size for size in divisors(queries) if shared % size == 0 or size % shared == 0]


def _cut_ties(cutting: Cutting, modules: Mapping[str, nn.Module]) -> None:
    """Give a style to each module that holds a cut parameter and has none: a head tied to an embedding."""
    for name, module in modules.items():
        for own, param in module._parameters.items():
            if param is None or id(param) not in cutting.cuts or (id(module), own) in cutting.handled:
                continue
            cut = cutting.cuts[id(param)][2]
            rows = Cut.split(cut.shape, 0, cutting.num_ranks, cutting.index)
            kinds = {nn.Linear: "colwise_gather_output", nn.Embedding: "embedding_rowwise"}
            kind = kinds.get(type(module)) if own == "weight" and cut == rows else None
            if kind is None:
                raise UserError(
                    f"{name}.{own} is tied to {cutting.cuts[id(param)][0]}, which is cut",
                    f"a {type(module).__name__} cannot compute with {cut.local_shape} of {cut.shape}",
                    "name styles for both in strategy.tensor_plan, or leave both out",
                )
            STYLES[kind](cutting, module, name, Rule(kind))


def _sum_gradient(param: nn.Parameter, cut: Cut | None, group: dist.ProcessGroup) -> None:
    """Have the gradient of `param` summed over the ranks, of heads that ranks share over those that share them."""

    def summed(grad: torch.Tensor) -> torch.Tensor:
        if cut is None:
            total = grad.contiguous().clone()
            dist.all_reduce(total, group=group)
            return total
        owned = Cut(cut.shape, cut.pieces)  # all copies count
        return take(_sum_of_pieces(grad, owned, group), owned)

    trained = param.requires_grad
    param.requires_grad_(True)  # one that is frozen now may be trained later
    param.register_hook(summed)
    param.requires_grad_(trained)


def _sum_of_pieces(grad: torch.Tensor, cut: Cut, group: dist.ProcessGroup) -> torch.Tensor:
    whole = torch.zeros(cut.shape, dtype=grad.dtype, device=grad.device)
    put(grad, cut, whole)
    dist.all_reduce(whole, group=group)
    return whole


def _watch(model: nn.Module, region: Region) -> None:
    """Before each forward in training: the same random numbers on all ranks, and at first, the same batch."""
    seen = 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal seen
        region.end()
        if not module.training or not torch.is_grad_enabled():
            return
        if seen < LOOKED_AT and torch._C._current_autograd_node() is None:
            seen += 1
            compare_batch((args, kwargs), region.group, "tensor-parallel")
        region.share_random()

    model.register_forward_pre_hook(Hook(before), with_kwargs=True, prepend=True)
