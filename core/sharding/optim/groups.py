"""What a script may not do with the groups of a prepared optimizer, and what is in none of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.optim.elementwise import Sight
from distui.core.sharding.units.unit import Unit


def refuse_changed_groups(inner: torch.optim.Optimizer, given: Sequence[Sequence[Any]]) -> None:
    """Refuse groups of other parameters than were `given`. Raises: UserError that names the group."""
    pairs = itertools.zip_longest((group["params"] for group in inner.param_groups), given, fillvalue=(None,))
    for index, (now, before) in enumerate(pairs):
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            continue
        raise UserError(
            f"the parameters in group {index} of the prepared {type(inner).__name__} are not those that it was given",
            f"there are {len(now)} in it, and {len(before)} were given; what is stepped is laid out in shards already",
            "add groups by optimizer.add_param_group, or prepare another optimizer with the groups as they are to be",
        )


def refuse_cut(inner: torch.optim.Optimizer, sights: Sequence[Sight], cuts: Cuts) -> None:
    """Refuse an optimizer that would take a piece of a parameter for the whole of it. Raises: UserError."""
    for group, sight in zip(inner.param_groups, sights, strict=True):
        if not sight.flat:
            cuts.refuse(
                group["params"],
                f"the optimizer {type(inner).__name__} with strategy.{cuts.setting}={cuts.size}",
                f"{sight.why_not_flat or 'it sees more than elements'}, so a piece would be stepped as something else",
                f"use an element-wise optimizer such as torch.optim.AdamW, or set strategy.{cuts.setting} to 1",
            )
        stepped = [param for param in group["params"] if inner.state.get(param)]
        cuts.refuse(
            stepped,
            f"the optimizer {type(inner).__name__} has states from before engine.prepare",
            "its states have the shapes of the whole",
            "prepare it before its first step, and load states with optimizer.load_state_dict or engine.load_state",
        )


Places = dict[int, set[int]]
"""Which parameters of which units, by the units' identities."""


class Stepping(Protocol):
    """What an optimizer is to `of_nobody`."""

    units: list[Unit]
    own: Places
    siblings: list[Any]


def of_nobody(optimizer: Stepping) -> Places:
    """Return what trains and no optimizer of the model steps: its gradients come to those of the next steps.

    The first optimizer changes them with its own; empty for the others.
    """
    found: Places = {}
    for unit in optimizer.units if optimizer is optimizer.siblings[0] else ():
        stepped = [other.own.get(id(unit), set()) for other in optimizer.siblings]
        if unit.trainable and max(map(len, stepped)) < len(unit.params):
            found[id(unit)] = set(range(len(unit.params))).difference(*stepped)
    return found
