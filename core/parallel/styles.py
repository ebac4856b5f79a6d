"""How a module is cut: which pieces of its parameters a rank keeps, and what stands before and behind its forward.

The names are transformers'. A style is a function on the user's module: parameters are named to be cut, hooks are set,
and where a bias must come after the sum this one module gets a forward of its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distui.core.axes.cut import Cut, part_of
from distui.core.errors import UserError
from distui.core.parallel.head_loss import Later, head_loss_of
from distui.core.parallel.regions import Region, gather_last, split_last, sum_of_all, sum_tokens
from distui.core.sharding.hooks import Hook


@dataclass(slots=True)
class Cutting:
    """One model while it is being cut."""

    group: dist.ProcessGroup
    region: Region
    index: int
    num_ranks: int
    cuts: dict[int, tuple[str, nn.Parameter, Cut]] = field(default_factory=dict)
    """What is to be cut, by identity, with its name."""
    handled: set[tuple[int, str]] = field(default_factory=set)
    """Modules, by identity, and names of their parameters that a style has taken care of."""
    partial: list[tuple[str, nn.Parameter, Cut | None]] = field(default_factory=list)
    """Parameters whose gradients are sums over ranks: whole ones used inside a region, and heads that ranks share."""

    def cut(self, module: nn.Module, name: str, own: str, cut: Cut) -> None:
        """Have `module.<own>`, called `name` in the model, be cut so. Raises: UserError where it is cut otherwise."""
        param = module._parameters[own]
        assert param is not None
        before = self.cuts.setdefault(id(param), (name, param, cut))
        if before[2] != cut:
            raise UserError(
                f"{name} and {before[0]} are one parameter, cut in two ways",
                f"{before[2].local_shape} and {cut.local_shape} of {cut.shape}",
                "name styles that cut it alike in strategy.tensor_plan, such as embedding_rowwise and "
                "colwise_gather_output for a head that is tied to the embedding",
            )
        self.handled.add((id(module), own))
        if cut.num_copies > 1 and not any(known is param for _, known, _ in self.partial):
            self.partial.append((name, param, cut))

    def split(self, shape: tuple[int, ...], dim: int, packed: int, name: str) -> Cut:
        """Return the even cut of a dimension, of `packed` equal parts."""
        if shape[dim] % packed:
            raise UserError(
                f"{name} has {shape[dim]} along dimension {dim}",
                f"{packed} packed parts of one length do not fill it",
                "write packed_colwise:N with the number of parts that lie behind each other",
            )
        return Cut.split(shape, dim, self.num_ranks, self.index, [shape[dim] // packed] * packed)


Style = Callable[[Cutting, nn.Module, str, "Rule"], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a plan says of one module or parameter."""

    style: str
    packed: int = 1
    region: str = ""
    """What lies between `f` and `g`: modules of one parent that are given the same share a sum of gradients."""
    num_heads: int = 0
    """Into how many heads the output features fall, where they do."""
    in_parts: bool = False
    """Whether the tokens are cut in front of and behind what it is in, which joins them and cuts the sum."""


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' linear layer of GPT-2: [in, out]


def _weight(module: nn.Module, name: str) -> torch.Tensor:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise UserError(
            f"{name} is a {type(module).__name__} without a matrix called weight",
            "linear layers, embeddings and transformers' Conv1D can be cut",
            "leave it out of the plan",
        )
    return weight


def _columns(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> int:
    """Cut the output features; return how many there are in all."""
    weight = _weight(module, name)
    dim = 1 if _is_transposed(module) else 0
    total = weight.shape[dim]
    packed = total // weight.shape[1 - dim] if rule.packed == 0 else rule.packed

    def cut_of(shape: tuple[int, ...], along: int) -> Cut:
        if rule.num_heads:
            return Cut.heads(shape, along, rule.num_heads, cutting.num_ranks, cutting.index)
        return cutting.split(shape, along, packed, name)

    own = cut_of(tuple(weight.shape), dim)
    cutting.cut(module, f"{name}.weight", "weight", own)
    if (bias := module._parameters.get("bias")) is not None:
        cutting.cut(module, f"{name}.bias", "bias", cut_of(tuple(bias.shape), 0))
    for attribute in ("out_features", "nf"):
        if hasattr(module, attribute):
            setattr(module, attribute, own.local_shape[dim])
    return total


def _begins(cutting: Cutting, module: nn.Module, region: str) -> None:
    """Set `f` before a module."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (*cutting.region.begin(region, args[0]), *args[1:]), kwargs
        key, value = next(iter(kwargs.items()))
        return args, {**kwargs, key: cutting.region.begin(region, value)[0]}

    module.register_forward_pre_hook(Hook(before), with_kwargs=True)


def _after(module: nn.Module, act: Callable[[Any], Any]) -> None:
    module.register_forward_hook(Hook(lambda module, args, output: act(output)))


def colwise(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the output features; the output stays cut."""
    _columns(cutting, module, name, rule)
    if not rule.in_parts:
        _begins(cutting, module, rule.region)


def colwise_gather_output(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the output features, and give the whole output to all ranks."""
    total = _columns(cutting, module, name, rule)
    _begins(cutting, module, name)

    def act(output: torch.Tensor) -> torch.Tensor:
        cutting.region.end()
        return output if type(output) is Later else gather_last(output, total, cutting.group)

    _after(module, act)
    if (loss := head_loss_of(module)) is not None:
        loss.gather = lambda logits: gather_last(logits, total, cutting.group)


def rowwise(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the input features, and sum what the ranks' pieces give; the bias is added once, after the sum."""
    weight, transposed = _weight(module, name), _is_transposed(module)
    dim = 0 if transposed else 1
    shape = tuple(weight.shape)
    cut = cutting.split(shape, dim, 1, name)
    cutting.cut(module, f"{name}.weight", "weight", cut)
    if hasattr(module, "in_features"):
        vars(module)["in_features"] = cut.local_shape[dim]
    splits = rule.style == "rowwise_split_input"

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if splits:
            x = split_last(x, cutting.group)
        partial = F.linear(x, self.weight.t() if transposed else self.weight)
        if not splits and not rule.in_parts:
            cutting.region.end()
        total = sum_tokens(partial, cutting.group) if rule.in_parts else sum_of_all(partial, cutting.group)
        return total if self.bias is None else total + self.bias.to(total.dtype)

    module.forward = types.MethodType(forward, module)


def embedding_rowwise(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the vocabulary: a rank looks up what it has, and the sum is everything."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.sparse:
        raise UserError(
            f"{name} cannot be cut by its vocabulary",
            f"it is {module}; a plain nn.Embedding without max_norm and sparse gradients can",
            "leave it out of the plan",
        )
    shape = tuple(module.weight.shape)
    low, high = part_of(shape[0], cutting.num_ranks, cutting.index)
    cutting.cut(module, f"{name}.weight", "weight", Cut.split(shape, 0, cutting.num_ranks, cutting.index))
    padding = module.padding_idx
    module.padding_idx = padding - low if padding is not None and low <= padding < high else None
    module.num_embeddings = high - low
    outside: list[torch.Tensor] = []

    def before(module: nn.Module, args: Any) -> Any:
        ids = args[0]
        if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= shape[0]):
            raise IndexError(f"index out of range in {name}: {int(ids.min())} to {int(ids.max())} of {shape[0]}")
        mask = (ids < low) | (ids >= high)
        outside[:] = [mask]
        return ((ids - low).masked_fill(mask, 0), *args[1:])

    module.register_forward_pre_hook(Hook(before))
    _after(module, lambda found: sum_of_all(found.masked_fill(outside.pop().unsqueeze(-1), 0.0), cutting.group))


def embedding_colwise(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the features of an embedding, and give the whole to all ranks."""
    shape = tuple(_weight(module, name).shape)
    cutting.cut(module, f"{name}.weight", "weight", cutting.split(shape, 1, 1, name))
    _after(module, lambda output: gather_last(output, shape[1], cutting.group))


def embedding_heads(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Cut the features of an embedding, one for each head, and leave the output cut."""
    shape = tuple(_weight(module, name).shape)
    cutting.cut(module, f"{name}.weight", "weight", cutting.split(shape, 1, 1, name))


def replicated_with_grad_allreduce(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Leave the parameters whole, and sum their gradients: each rank's are of what it computes inside a region."""
    for own, param in module.named_parameters(recurse=False):
        cutting.partial.append((f"{name}.{own}", param, None))


def moe_tp_experts(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Sum what the ranks' pieces of all experts give; the parameters have rules of their own."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(cutting.region.begin(name, *args)), kwargs

    module.register_forward_pre_hook(Hook(before), with_kwargs=True)

    def act(output: torch.Tensor) -> torch.Tensor:
        cutting.region.end()
        return sum_of_all(output, cutting.group)

    _after(module, act)


def all_reduce(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Sum the output over the ranks."""
    _after(module, lambda output: sum_of_all(output, cutting.group))


def replicate(cutting: Cutting, module: nn.Module, name: str, rule: Rule) -> None:
    """Leave it whole."""


def divide(cutting: Cutting, module: nn.Module, attribute: str, name: str) -> None:
    """Divide a number that a module holds of what is cut, such as `num_heads`."""
    value = getattr(module, attribute)
    if not isinstance(value, int) or value % cutting.num_ranks:
        raise UserError(
            f"tensor_parallel={cutting.num_ranks} does not divide {name}={value}",
            "each rank computes with its part of it",
            f"set strategy.tensor_parallel to {' or '.join(map(str, divisors(value)))}",
        )
    setattr(module, attribute, value // cutting.num_ranks)


def divisors(number: Any) -> list[int]:
    """Return what divides a number of heads, say; of no number 1 alone."""
    return [size for size in range(1, number + 1) if number % size == 0] if isinstance(number, int) else [1]


def parameter(cutting: Cutting, module: nn.Module, own: str, name: str, rule: Rule) -> None:
    """Cut a parameter that a rule names itself: experts in three dimensions, or one without a module of its own."""
    param = module._parameters[own]
    assert param is not None
    shape, kind = tuple(param.shape), rule.style
    if kind in ("colwise", "packed_colwise"):
        dim = -2 if len(shape) > 1 else -1
    elif kind in ("rowwise", "packed_rowwise"):
        dim = -1
    else:
        raise UserError(
            f"{kind} cannot be said of the parameter {name}",
            "it is said of modules",
            f"known: {', '.join(ON_PARAMETERS)}",
        )
    if kind.endswith("rowwise") and len(shape) == 1:
        return  # a bias behind the sum
    cutting.cut(module, name, own, cutting.split(shape, dim % len(shape), rule.packed, name))


ON_PARAMETERS = ("colwise", "rowwise", "packed_colwise", "packed_rowwise")
STYLES: dict[str, Style] = {
    "colwise": colwise,
    "packed_colwise": colwise,
    "colwise_gather_output": colwise_gather_output,
    "colwise_rep": colwise_gather_output,
    "rowwise": rowwise,
    "rowwise_split_input": rowwise,
    "embedding_rowwise": embedding_rowwise,
    "embedding_colwise": embedding_colwise,
    "embedding_heads": embedding_heads,
    "replicated_with_grad_allreduce": replicated_with_grad_allreduce,
    "moe_tp_experts": moe_tp_experts,
    "all_reduce": all_reduce,
    "replicate": replicate,
}
"""What a plan may name, beside `divide` for a number that a module holds."""
