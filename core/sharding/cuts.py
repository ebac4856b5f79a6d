"""Which parameters of a model are cut over the ranks that share its batch, and how whole ones come of their pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.axes.tensors import assemble, take
from distui.core.errors import UserError
from distui.core.sharding.units.guarded import Refusal, watching
from distui.core.sharding.units.partition import UnitSpec

MARK = "_distui_cut"
"""What a parameter has in its `__dict__` that is but a piece, for as long as it lives."""


@dataclass(slots=True)
class ExpertCuts:
    """Experts are over other ranks than what else is cut, and their states are shared among others."""

    held: frozenset[int]
    """The experts' parameters, by identity."""
    group: dist.ProcessGroup
    """The ranks that have all of them together, each once."""
    copies: dist.ProcessGroup | None
    """The ranks that hold the same pieces, and share their states; None where that is this rank alone."""
    stage: dist.ProcessGroup
    """All ranks that hold some of the same layers' experts: each sees gradients of the same parameters."""
    refusal: Refusal
    """Why nobody but their own module reads them: whoever does would not notice."""


class Cuts:
    """The cut parameters of one model by identity; what is not among them every rank of the group holds whole."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        kind: str = "tensor-parallel ranks",
        setting: tuple[str, int] | None = None,
        num_ranks: int = 1,
    ) -> None:
        """`group` are the ranks over which parameters are cut, `kind` and `setting` what errors call them.

        None where nothing but experts is, over `num_ranks`.
        """
        self.group, self.kind = group, kind
        self.index, self.num_ranks = 0, num_ranks
        if group is not None:
            self.index, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.setting, self.size = setting or ("tensor_parallel", self.num_ranks)
        self.of: dict[int, Cut] = {}
        self.elsewhere: set[int] = set()
        """Parameters of which this rank holds nothing, by identity: those of a pipeline's other stages."""
        self.tensor: Cuts | None = None
        """In a pipeline of tensor-parallel ranks: what these alone have cut."""
        self.shared: dict[int, str] = {}
        """Whole parameters that other stages of a pipeline hold as well, by identity, and which stages these are."""
        self.experts: ExpertCuts | None = None
        """Where experts are over ranks."""
        self.refusal: Refusal | None = None
        """Why nobody reads what is elsewhere."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch what is elsewhere, and experts, from here on; inside, where units are made, the engine reads them."""
        params = list(model.parameters())
        with ExitStack() as watched:
            if self.refusal is not None:
                away = [param for param in params if id(param) in self.elsewhere]
                watched.enter_context(watching(away, self.refusal))
            if self.experts is not None:
                here = [param for param in params if self.is_expert(param) and id(param) not in self.elsewhere]
                watched.enter_context(watching(here, self.experts.refusal))
            yield

    def lifted(self) -> AbstractContextManager[Any]:
        """Let whoever is inside read what nobody else may."""
        stack = ExitStack()
        for refusal in (self.refusal, self.experts.refusal if self.experts is not None else None):
            if refusal is not None:
                stack.enter_context(refusal.lifted())
        return stack

    def get(self, param: torch.Tensor) -> Cut | None:
        """Return how `param` is cut; None of one that is whole."""
        return self.of.get(id(param))

    def counts(self, param: torch.Tensor) -> bool:
        """Tell whether this rank, of all that hold the same, counts it in a norm and writes it to a file."""
        cut = self.of.get(id(param))
        return self.index == 0 if cut is None else cut.is_owner

    def is_expert(self, param: torch.Tensor) -> bool:
        """Tell whether the states of `param` are shared among others than those of what is whole."""
        return self.experts is not None and id(param) in self.experts.held

    def assemble(self, param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Return the whole of what every rank has its piece of, which lies as `param` does.

        Collective: those who have the pieces.
        """
        cut = self.of.get(id(param))
        if cut is None:
            return local
        group = self.group
        if self.experts is not None and self.is_expert(param):
            group = self.experts.group
        assert group is not None
        return assemble(local, cut, group)

    def take(self, param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's piece of `whole`, which lies as `param` does; what has another shape stays as it is."""
        cut = self.of.get(id(param))
        return whole if cut is None or tuple(whole.shape) != cut.shape else take(whole, cut)

    def taken(self, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole state of `model` with this rank's pieces in it.

        Raises: UserError for a tensor that has not the whole shape.
        """
        found = dict(state)
        for name, param in nn.Module.named_parameters(model, remove_duplicate=False):
            cut = self.of.get(id(param))
            if cut is None or name not in found:
                continue
            if tuple(found[name].shape) != cut.shape:
                raise UserError(
                    f"{name} is {list(found[name].shape)} in the state and {list(cut.shape)} in the model",
                    f"it is cut over {self.num_ranks} {self.kind}, each of which takes its piece of it",
                    "give whole weights, as engine.get_state_dict returns them",
                )
            found[name] = take(found[name], cut)
        return found

    def held(self, specs: list[UnitSpec]) -> list[UnitSpec]:
        """Return units without what is elsewhere; what stages share is in units of its own, which lie alike on all."""
        shared: dict[str, UnitSpec] = {}
        for spec in specs:
            params, spec.params = spec.params, []
            for name, param in params:
                if id(param) in self.shared:
                    who = self.shared[id(param)]
                    shared.setdefault(who, UnitSpec(f"shared by {who}", is_root=True)).params.append((name, param))
                elif id(param) not in self.elsewhere:
                    spec.params.append((name, param))
        return [*(shared[who] for who in sorted(shared)), *(spec for spec in specs if spec.params)]

    def refuse(self, params: Iterable[torch.Tensor], what: str, why: str, fix: str) -> None:
        """Raise UserError where one of `params` is cut."""
        param = next((param for param in params if id(param) in self.of), None)
        if param is not None:
            cut = self.of[id(param)]
            size = "x".join(map(str, cut.local_shape))
            over = "ranks that share the experts" if self.is_expert(param) else f"{self.num_ranks} {self.kind}"
            raise UserError(
                what,
                f"a rank has {size} of a parameter of {'x'.join(map(str, cut.shape))}, cut over {over}; {why}",
                fix,
            )


def reads_all(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of what has `cuts` read what nobody else may."""

    @functools.wraps(method)
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.cuts.lifted() if self.cuts is not None else nullcontext():
            return method(self, *args, **kwargs)

    return reading


def refuse_cut(model: nn.Module) -> None:
    """Refuse a model that was cut for another engine: its pieces would be taken for the whole. Raises: UserError."""
    for name, param in nn.Module.named_parameters(model):
        if MARK in vars(param):
            raise UserError(
                f"{name} is a piece of {tuple(param.shape)}: the model was cut over ranks before",
                "its modules compute with pieces, and an engine would take them for the whole",
                "build the model anew, and load engine.get_state_dict(model) of the earlier one into it",
            )
