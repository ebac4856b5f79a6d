"""The tables of a unit's states: every way that is allowed leads where it says, and every other raises and says so."""

from __future__ import annotations

from typing import Any

import pytest

from distui.core.sharding.units.states import GRAD_MOVES, PARAM_MOVES, GradState, Machine, ParamState, StateError

TABLES: list[tuple[type, Any]] = [(ParamState, PARAM_MOVES), (GradState, GRAD_MOVES)]
PAIRS = [
    (moves, state, call)
    for states, moves in TABLES
    for state in states  # type: ignore[attr-defined]
    for call in sorted({call for _, call in moves})
]


@pytest.mark.parametrize(("moves", "state", "call"), PAIRS, ids=lambda value: getattr(value, "value", str(value)[:9]))
def test_each_call_in_each_state(moves: Any, state: Any, call: str) -> None:
    machine: Machine[Any] = Machine("blocks.3", state, moves)
    if (state, call) in moves:
        machine.do(call)
        assert machine.state is moves[state, call]
        return
    with pytest.raises(
        StateError, match=rf"unit blocks\.3: '{call}' while its {type(state).__name__} is {state.value}"
    ):
        machine.do(call)
    assert machine.state is state, "a refused call changes nothing"


@pytest.mark.parametrize(
    ("moves", "start", "calls", "end"),
    [
        (PARAM_MOVES, ParamState.ABSENT, ("gather", "arrive", "release"), ParamState.ABSENT),
        (PARAM_MOVES, ParamState.WHOLE, ("publish", "arrive"), ParamState.WHOLE),
        (GRAD_MOVES, GradState.FILLING, ("write", "complete", "send", "arrive", "reopen"), GradState.FILLING),
        (GRAD_MOVES, GradState.FILLING, ("complete", "keep", "reopen", "complete"), GradState.READY),
        (GRAD_MOVES, GradState.REDUCING, ("discard",), GradState.FILLING),
    ],
)
def test_the_ways_of_a_step(moves: Any, start: Any, calls: tuple[str, ...], end: Any) -> None:
    machine: Machine[Any] = Machine("root", start, moves)
    for call in calls:
        machine.do(call)
    assert machine.state is end


@pytest.mark.parametrize(
    ("moves", "state", "call"),
    [
        (PARAM_MOVES, ParamState.ARRIVING, "release"),
        (PARAM_MOVES, ParamState.WHOLE, "gather"),
        (PARAM_MOVES, ParamState.ABSENT, "publish"),
        (GRAD_MOVES, GradState.REDUCING, "write"),
        (GRAD_MOVES, GradState.FILLING, "send"),
        (GRAD_MOVES, GradState.REDUCED, "send"),
    ],
    ids=str,
)
def test_what_would_lose_numbers_is_not_allowed(moves: Any, state: Any, call: str) -> None:
    with pytest.raises(StateError, match="This is a bug in distui"):
        Machine("root", state, moves).do(call)
