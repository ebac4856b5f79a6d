"""Sequence parallelism: between attention and feed-forward, a block's hidden state is cut along the sequence.

Tensor-parallel ranks hold the same hidden state there, with what norms keep of it for backward. Here each has its part
of the tokens: it is cut in front of the first block and joined behind the last. An inside, attention or feed-forward,
gets all tokens; where nothing but cut matrices reads them, their sums are cut along the sequence as they are made
(Korthikanti et al., arXiv 2205.05198, section 4.2.2), so that as many bytes travel as without. Parameters outside of
the insides see a part of the tokens, so their gradients are summed.

Legend: B batch, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.parallel.regions import Region, gather_summed, gather_tokens, split_tokens
from distui.core.parallel.styles import Cutting
from distui.core.sharding.hooks import Hook
from distui.core.sharding.units.partition import find_blocks

_IN_PARTS = {"colwise", "packed_colwise", "rowwise", "replicated_with_grad_allreduce", "divide", "replicate"}
"""Styles of insides whose input only cut matrices read, and whose one rowwise matrix makes their output."""
_OFF = "set strategy.sequence_parallel to false"


class Stream:
    """The hidden state of one model's blocks, which is cut along the sequence outside of their insides."""

    def __init__(self, model: nn.Module, plan: Mapping[str, str], elsewhere: Collection[str], num_ranks: int) -> None:
        """Find the insides of the blocks by the plan; `elsewhere` are experts that other ranks will have.

        Raises: UserError for blocks that are not known to be right.
        """
        self.model, self._elsewhere = model, elsewhere
        self.blocks = find_blocks(model)
        self.insides: dict[str, bool] = {}
        """By name, whether their sums are made in parts; else they compute as without, and their output is cut."""
        if not self.blocks:
            raise self._unknown("it has no row of like blocks", num_ranks)
        for name, block in self.blocks:
            self._find(name, block, plan, num_ranks)

    def _find(self, name: str, block: nn.Module, plan: Mapping[str, str], num_ranks: int) -> None:
        kind = type(block)
        if not kind.__module__.startswith("transformers.models."):
            raise self._unknown(f"{name}, a {kind.__name__}, is none of transformers' blocks", num_ranks)
        if list(block.parameters(recurse=False)):
            raise self._unknown(f"{name} has parameters of its own beside its modules'", num_ranks)
        for own, child in block.named_children():
            inner = f"{name}.{own}"
            styles = {other: style for other, style in plan.items() if other.startswith(f"{inner}.")}
            if any(other.startswith(f"{inner}.") for other in self._elsewhere):
                self.insides[inner] = False
            elif styles:
                ends = sum(style == "rowwise" for style in styles.values())
                covered = all(
                    not list(module.parameters(recurse=False)) or f"{inner}.{at}" in styles
                    for at, module in child.named_modules()
                )
                kinds = {style.partition(":")[0] for style in styles.values()}
                self.insides[inner] = covered and ends == 1 and kinds <= _IN_PARTS
            elif inner in plan or (list(child.parameters()) and not _is_by_token(child)):
                what = "is neither a norm nor an attention or feed-forward that is cut"
                raise self._unknown(f"{inner}, a {type(child).__name__}, {what}", num_ranks)

    def _unknown(self, why: str, num_ranks: int) -> UserError:
        name = type(self.model).__name__
        return UserError(
            f"sequence_parallel with tensor_parallel={num_ranks} is not known to be right for {name}",
            f"{why}; known are blocks of transformers that add what attention and feed-forward give of a norm",
            _OFF,
        )

    def install(self, cutting: Cutting) -> None:
        """Set what cuts and joins the hidden state around blocks and insides; note whose gradients are parts."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        group, random = cutting.group, Region(cutting.group)

        def into_blocks(module: nn.Module, args: Any, kwargs: Any) -> Any:
            random.fork(_first(args, kwargs).device)
            return _replaced(args, kwargs, lambda x_BTD: split_tokens(x_BTD, group))

        def out_of_blocks(module: nn.Module, args: Any, output: Any) -> Any:
            random.end()
            return _of_first(output, lambda x_BTD: gather_tokens(x_BTD, self._total, group))

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            random.end()
            config = getattr(module, "config", None)
            wanted = kwargs.get("output_hidden_states")
            if wanted if wanted is not None else getattr(config, "output_hidden_states", False):
                raise UserError(
                    "output_hidden_states with strategy.sequence_parallel",
                    f"between blocks each of {cutting.num_ranks} ranks has a part of the tokens",
                    f"leave it out, or {_OFF}",
                )

        self._total = 0

        def measure(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._total = _first(args, kwargs).shape[1]

        first, last = self.blocks[0][1], self.blocks[-1][1]
        self.model.register_forward_pre_hook(Hook(note), with_kwargs=True)
        first.register_forward_pre_hook(Hook(measure), with_kwargs=True)
        first.register_forward_pre_hook(Hook(into_blocks), with_kwargs=True)
        last.register_forward_hook(Hook(out_of_blocks))
        for name, in_parts in self.insides.items():
            self._around(modules[name], in_parts, group)
        for name, block in self.blocks:
            for own, param in block.named_parameters():
                inner = next((inside for inside in self.insides if f"{name}.{own}".startswith(f"{inside}.")), None)
                ends = inner is not None and self.insides[inner] and id(param) not in cutting.cuts
                noted = any(known is param for _, known, _ in cutting.partial)
                if (inner is None or ends) and not noted:
                    cutting.partial.append((f"{name}.{own}", param, None))

    def _around(self, module: nn.Module, in_parts: bool, group: Any) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            join = gather_summed if in_parts else gather_tokens
            return _replaced(args, kwargs, lambda x_BTD: join(x_BTD, self._total, group))

        module.register_forward_pre_hook(Hook(enter), with_kwargs=True)
        if not in_parts:
            leave = Hook(lambda module, args, output: _of_first(output, lambda x_BTD: split_tokens(x_BTD, group)))
            module.register_forward_hook(leave)


def _is_by_token(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and not list(module.children())


def _first(args: Any, kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _replaced(args: Any, kwargs: Any, act: Any) -> Any:
    if args:
        return (act(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"])}


def _of_first(output: Any, act: Any) -> Any:
    return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)
