"""The states of a unit's memory, and the only ways from one to another.

    parameters   ABSENT --gather--> ARRIVING --arrive--> WHOLE --release--> ABSENT        (stage 3)
                 WHOLE --publish--> ARRIVING --arrive--> WHOLE                            (stages 1 and 2, after a step)
    gradients    FILLING --complete--> READY --send--> REDUCING --arrive--> REDUCED --reopen--> FILLING
                                       READY --keep--> REDUCED       (one rank, or a gradient that stays on its rank)

Only WHOLE parameters can be read as they are; the others' class sees to that (`guarded`). `discard` forgets a gradient
in any state. A call that a table does not have raises with unit, state and call: it is a bug of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from distui.core.errors import DistuiError


class ParamState(Enum):
    """Where a unit's whole parameters are on this rank."""

    ABSENT = "absent"
    ARRIVING = "arriving"
    WHOLE = "whole"


class GradState(Enum):
    """Where a unit's gradients are in the current backward."""

    FILLING = "filling"
    READY = "ready"
    REDUCING = "reducing"
    REDUCED = "reduced"


PARAM_MOVES: Mapping[tuple[ParamState, str], ParamState] = {
    (ParamState.ABSENT, "gather"): ParamState.ARRIVING,
    (ParamState.ABSENT, "place"): ParamState.WHOLE,
    (ParamState.WHOLE, "publish"): ParamState.ARRIVING,
    (ParamState.ARRIVING, "arrive"): ParamState.WHOLE,
    (ParamState.WHOLE, "place"): ParamState.WHOLE,
    (ParamState.WHOLE, "release"): ParamState.ABSENT,
}
"""`place` puts parameters into memory that is whole already: where a unit is laid out, and in `full_parameters`."""

GRAD_MOVES: Mapping[tuple[GradState, str], GradState] = {
    (GradState.FILLING, "write"): GradState.FILLING,
    (GradState.READY, "write"): GradState.READY,
    (GradState.FILLING, "complete"): GradState.READY,
    (GradState.READY, "complete"): GradState.READY,
    (GradState.READY, "send"): GradState.REDUCING,
    (GradState.READY, "keep"): GradState.REDUCED,
    (GradState.REDUCING, "arrive"): GradState.REDUCED,
    (GradState.REDUCED, "reopen"): GradState.FILLING,
    **{(state, "discard"): GradState.FILLING for state in GradState},
}

S = TypeVar("S", bound=Enum)


class StateError(DistuiError):
    """A unit was asked for what its state does not allow."""


class Machine(Generic[S]):
    """One unit's state of one kind; `do` is the only way to change it."""

    __slots__ = ("_moves", "_unit", "state")

    def __init__(self, unit: str, start: S, moves: Mapping[tuple[S, str], S]) -> None:
        self._unit, self.state, self._moves = unit, start, moves

    def do(self, call: str) -> None:
        """Go where `call` leads from here. Raises: StateError where it leads nowhere."""
        following = self._moves.get((self.state, call))
        if following is None:
            allowed = sorted(name for state, name in self._moves if state is self.state)
            raise StateError(
                f"unit {self._unit}: {call!r} while its {type(self.state).__name__} is {self.state.value}; "
                f"allowed are {', '.join(allowed)}. This is a bug in distui"
            )
        self.state = following
