"""What modules leave in their attributes while a stage runs, for whoever reads it of modules of another stage.

A block may keep something in an attribute (a loss of its router, a map of its attention), which the script, or the
model's forward, collects of all blocks afterwards. Of blocks that ran on another rank there is what was there before.
So each stage notes what attributes the forwards of its modules set, and tells the others; there something takes their
place that raises wherever it is used.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distui.core.errors import UserError

Name = tuple[str, str]
"""A module's and an attribute's."""

_OWN = ("forward", "training", "_compiled_call_impl", "distui_own_forward")
"""What the engine and torch change themselves; what torch keeps of any module is left out too."""
_GROWING = (list, dict, set, deque)
_NOTHING: Any = object()


class NotHere:
    """Stands for what a module of another stage has in an attribute: raises wherever it is used."""

    def __init__(self, what: str, where: str) -> None:
        vars(self)["_told"] = what, where

    def _refuse(self, *_: Any, **__: Any) -> Any:
        what, where = vars(self)["_told"]
        raise UserError(
            f"{what} was read on a rank that does not run it",
            f"it was set by {where}, and only there it is what the forward left; what is computed of all blocks' would "
            "be this stage's share of it",
            "hand it on inside the blocks' outputs to where the loss is computed, or set strategy.pipeline_parallel "
            "to 1",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance(module.attribute, torch.Tensor)` asks it, and would leave out what is elsewhere.
        return self._refuse()

    def __repr__(self) -> str:
        return f"<{vars(self)['_told'][0]}, on another stage>"

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        return next(leaf for leaf in leaves if type(leaf) is NotHere)._refuse()


def _refuse_all() -> None:
    both = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
    names = [f"{kind}{name}" for kind in ("", "r", "i") for name in both]
    names += "neg pos abs invert bool int float complex index len iter next getitem setitem contains".split()  # noqa: SIM905
    names += "call str format lt le gt ge eq ne enter round array reversed divmod rdivmod".split()  # noqa: SIM905
    for name in names:
        setattr(NotHere, f"__{name}__", NotHere._refuse)


_refuse_all()


class LeftBehind:
    """The attributes that the forwards of one model's modules set, on this rank and on others."""

    def __init__(self, model: nn.Module, blocks: Iterable[tuple[str, nn.Module]]) -> None:
        self._modules = dict(model.named_modules())
        self._block_of = {
            f"{name}.{inner}".rstrip("."): name for name, block in blocks for inner, _ in block.named_modules()
        }
        """Of modules that are in a block, its name."""
        self._before: dict[str, dict[str, Any]] = {}
        self._set: set[Name] = set()
        """What was ever set on this rank."""
        self._told: set[Name] = set()
        self._has_guessed = False
        self._guessed: set[Name] = set()
        """What nobody has told to be set on other ranks."""
        self._replaced: dict[Name, Any] = {}

    def begin(self, not_here: Iterable[str]) -> None:
        """Note what there is before a forward; of modules `not_here`, which do not run, nothing."""
        without = set(not_here)
        self._before = {
            name: _attributes(module)
            for name, module in self._modules.items()
            if name not in without and self._block_of.get(name) not in without
        }

    def end(self) -> None:
        """Note what the forward has set since."""
        for name, before in self._before.items():
            now = _attributes(self._modules[name])
            self._set |= {
                (name, key)
                for key, value in now.items()
                if not _same(before.get(key, _NOTHING), value) and type(value[0]) is not NotHere
            }
        self._before = {}

    def guess(self, others: Iterable[str], where: str) -> None:
        """In the midst of a first forward: what blocks of this rank have set, other blocks of the kind will have."""
        if self._has_guessed or not self._before:
            return
        self._has_guessed, before = True, self._before
        self.end()
        self._before = before
        inner = set()
        for name, key in self._set:
            if (block := self._block_of.get(name)) is not None:
                inner.add((type(self._modules[block]), name[len(block) :], key))
        for other in others:
            for kind, path, key in inner:
                if type(self._modules[other]) is kind and f"{other}{path}" in self._modules:
                    self._guessed.add((f"{other}{path}", key))
                    self._replace((f"{other}{path}", key), where)

    @property
    def has_news(self) -> bool:
        """Whether something was set that the others have not been told."""
        return self._set > self._told

    def news(self) -> list[Name]:
        """Return what the others have not been told."""
        found = sorted(self._set - self._told)
        self._told |= self._set
        return found

    def hear(self, of_ranks: Iterable[tuple[str, list[Name]]]) -> None:
        """Replace what other ranks have set, and this one has not; each gives how errors call it, and its news."""
        for where, names in of_ranks:
            self._guessed.difference_update(names)
            for name in names:
                if name not in self._set:
                    self._replace(name, where)
        self._put_back(self._guessed)
        self._guessed.clear()

    def _replace(self, name: Name, where: str) -> None:
        module, key = self._modules[name[0]], name[1]
        if name not in self._replaced:
            self._replaced[name] = module.__dict__.get(key, _NOTHING)
        module.__dict__[key] = NotHere(".".join(part for part in name if part), where)

    def remove(self) -> None:
        """Put back what was there."""
        self._put_back(set(self._replaced))

    def _put_back(self, names: set[Name]) -> None:
        for name, key in names:
            own, value = self._modules[name].__dict__, self._replaced.pop((name, key))
            if value is _NOTHING:
                own.pop(key, None)
            else:
                own[key] = value


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Return attributes and buffers of `module`, each with what counts its changes in place."""
    own = ((key, value) for key, value in vars(module).items() if key not in _OWN and key not in _OF_TORCH)
    return {key: (value, _changes(value)) for key, value in itertools.chain(own, module._buffers.items())}


_OF_TORCH = frozenset(vars(nn.Module()))


def _changes(value: Any) -> int:
    if type(value) is NotHere:
        return 0
    if isinstance(value, _GROWING):
        return len(value)
    return value._version if type(value) is torch.Tensor and not value.is_inference() else 0


def _same(before: tuple[Any, int] | Any, now: tuple[Any, int]) -> bool:
    return before is not _NOTHING and before[0] is now[0] and before[1] == now[1]


def sizes_of(given: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return what a block is given that can grow, with its size."""
    return [(value, len(value)) for value in given if isinstance(value, _GROWING)]


def refuse_growth(sizes: Iterable[tuple[Any, int]], block: str, alone: str) -> None:
    """Raise UserError where a block has put something into what it was given."""
    for value, size in sizes:
        if len(value) != size:
            raise UserError(
                f"the block {block} puts something into a {type(value).__name__} that it is given",
                "each rank of a pipeline runs its own blocks, so that it would hold this stage's share of what all put "
                "there",
                f"hand it on inside the block's output, or {alone}",
            )
