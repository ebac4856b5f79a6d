"""Parameters that an optimizer steps from some later step on: unfrozen ones, and those of `add_param_group`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from distui.core.errors import UserError
from distui.core.sharding.optim.elementwise import sight_of
from distui.core.sharding.optim.prepared import prefer_fused
from distui.core.sharding.optim.runs import FlatRun, flat_runs

if TYPE_CHECKING:
    from distui.core.sharding.units.unit import Unit


class Grows(Protocol):
    """What of a `ShardedOptimizer` is read and added to."""

    inner: Any
    runs: list[list[FlatRun]]
    given: list[list[Any]]
    own: dict[int, set[int]]
    params_of_groups: list[int]

    @property
    def stream(self) -> Any:
        """What steps offloaded units."""

    @property
    def flat(self) -> Any:
        """What steps flat buffers itself."""

    def places_of(self, params: list[Any]) -> list[tuple[Unit, int]]:
        """Return where the units have `params`."""


def can_grow(optimizer: Grows) -> Iterator[Any]:
    """Yield the parameters whose states may come later than the others'."""
    for group, params in zip(optimizer.inner.param_groups, optimizer.given, strict=True):
        if _grows(optimizer, group):
            yield from params


def _grows(optimizer: Grows, group: dict[str, Any]) -> bool:
    return optimizer.stream is None and optimizer.flat is None and sight_of(optimizer.inner, group).flat


def late_runs(optimizer: Grows, group: dict[str, Any], places: list[tuple[Unit, int]], what: str) -> list[FlatRun]:
    """Return what is stepped for the parameters at `places`, which join `group` of `optimizer`.

    Raises: UserError where its states cannot grow; `what` says in it what the script did.
    """
    if not places:
        return []
    if not _grows(optimizer, group):
        raise UserError(
            f"{places[0][0].param_names[places[0][1]]} was {what} after engine.prepare",
            "the optimizer's states are laid out already, and this kind (offloaded, 8-bit or of whole "
            "matrices) cannot grow",
            "give the optimizer every parameter, with requires_grad on, until engine.prepare has run; freeze it then",
        )
    for unit, index in places:
        optimizer.own.setdefault(id(unit), set()).add(index)
    with contextlib.ExitStack() as ours:
        for unit in {id(unit): unit for unit, _ in places}.values():
            ours.enter_context(unit.own_references())
        return flat_runs(places, None)


def add_group(optimizer: Grows, param_group: dict[str, Any]) -> None:
    """Add a group of the model's parameters that no group of `optimizer` has. All ranks, alike.

    Raises: UserError, and leaves the optimizer as it was, where they are not the model's or its states cannot grow.
    """
    groups = optimizer.inner.param_groups
    optimizer.inner.add_param_group(param_group)
    group = groups[-1]
    params = list(group["params"])
    try:
        places = optimizer.places_of(params)
        prefer_fused(group)
        runs = late_runs(optimizer, group, places, "added by add_param_group")
    except UserError:
        groups.pop()
        raise
    optimizer.runs.append(runs)
    optimizer.given.append(params)
    optimizer.params_of_groups.append(len(params))
