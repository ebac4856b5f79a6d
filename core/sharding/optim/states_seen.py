"""What a script sees as `optimizer.state`, whose keys are the ranges that the inner optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

import torch

from distui.core.errors import UserError
from distui.core.sharding.optim.runs import FlatRun
from distui.core.sharding.units.unit import Unit


class Steps(Protocol):
    """What an optimizer is to this file."""

    inner: torch.optim.Optimizer
    runs: list[list[FlatRun]]
    place: dict[int, tuple[Unit, int]]
    stream: Any
    flat: Any


class _StateOfParameter(dict[str, Any]):
    """Views of a parameter's part of the states; what it has, and its numbers, are those of several parameters."""

    def __init__(self, name: str, views: dict[str, Any]) -> None:
        super().__init__(views)
        self._name = name

    def refusal(self, *_: Any, **__: Any) -> UserError:
        return UserError(
            f"the state of {self._name} cannot get or lose an entry, or another number, by itself",
            f"it has {', '.join(sorted(self)) or 'none'}, of which it shares the numbers with parameters beside it",
            "change its tensors in place; clear optimizer.state as a whole, or set numbers before engine.prepare",
        )

    def __setitem__(self, key: str, value: Any) -> None:
        part = self.get(key)
        if not isinstance(part, torch.Tensor) or not part.dim() or getattr(value, "shape", None) != part.shape:
            raise self.refusal()
        part.copy_(value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self.refusal()

    __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse


class StatesSeen(MutableMapping[Any, Any]):
    """The inner optimizer's own states; by a parameter of the model, views of them where a rank has them whole."""

    def __init__(self, optimizer: Steps) -> None:
        self._optimizer = optimizer
        self._states: MutableMapping[Any, Any] = optimizer.inner.state

    def _of_parameter(self, param: Any) -> _StateOfParameter | None:
        optimizer = self._optimizer
        if id(param) not in optimizer.place:
            return None
        unit, index = optimizer.place[id(param)]
        in_parts = unit.placement.shards_optimizer or optimizer.stream is not None or optimizer.flat is not None
        run = self._run_of(param)
        if run is None or in_parts:
            stage, num_ranks = unit.placement.stage, unit.placement.num_ranks
            parts = f"at zero_stage={stage} on {num_ranks} ranks the states lie in flat ranges of several parameters"
            raise UserError(
                f"optimizer.state[{unit.param_names[index]}] cannot be had",
                parts if in_parts else "the optimizer does not step this parameter",
                "go over optimizer.state.values() where every element is treated alike, or save_state and read that",
            )
        span = unit.layout.spans[index]
        views = {
            key: value[span.offset - run.start : span.end - run.start].view(span.shape)
            if isinstance(value, torch.Tensor) and value.dim() and len(run.shape) == 1
            else value
            for key, value in self._states.get(run.param, {}).items()
        }
        return _StateOfParameter(unit.param_names[index], views)

    def _run_of(self, param: Any) -> FlatRun | None:
        unit, index = self._optimizer.place[id(param)]
        every = (run for runs in self._optimizer.runs for run in runs)
        return next((run for run in every if run.unit is unit and index in run.indices), None)

    def __contains__(self, key: Any) -> bool:
        if key in self._states or id(key) not in self._optimizer.place:
            return key in self._states
        run = self._run_of(key)
        return run is not None and run.param in self._states

    def __getitem__(self, key: Any) -> Any:
        found = None if key in self._states else self._of_parameter(key)
        return self._states[key] if found is None else found

    def __setitem__(self, key: Any, value: Any) -> None:
        own = None if key in self._states else self._of_parameter(key)
        if own is None:
            self._states[key] = value
            return
        if own.keys() != value.keys():
            raise own.refusal()
        for name, part in value.items():
            own[name] = part

    def __delitem__(self, key: Any) -> None:
        if key not in self._states and (own := self._of_parameter(key)) is not None:
            raise own.refusal()
        del self._states[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return repr(self._states)


def states_by_parameter(optimizer: Steps) -> dict[str, Any] | None:
    """Return a `state_dict` as plain torch has it, views in the parameters' own shapes; None where none is whole."""
    groups = optimizer.inner.param_groups
    params = [param for group in groups for param in group["params"]]
    numbers = {id(param): number for number, param in enumerate(params)}
    seen = StatesSeen(optimizer)
    try:
        states = {number: dict(seen[param]) for number, param in enumerate(params) if param in seen}
    except UserError:
        return None
    return {
        "state": states,
        "param_groups": [{**group, "params": [numbers[id(param)] for param in group["params"]]} for group in groups],
    }


def flat_states(optimizer: Steps, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return what the inner optimizer loads for a `state_dict` in the parameters' own shapes; another as it is."""
    params = [param for group in optimizer.inner.param_groups for param in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    shapes_fit = len(numbers) == len(params) and all(
        value.shape == params[numbers.index(number)].shape
        for number, state in state_dict["state"].items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    in_parts = any(run.unit.placement.shards_optimizer for runs in optimizer.runs for run in runs)
    if not shapes_fit or in_parts or optimizer.stream is not None or optimizer.flat is not None:
        return state_dict
    given = {id(param): state_dict["state"].get(number, {}) for number, param in zip(numbers, params, strict=True)}
    states: dict[int, dict[str, Any]] = {}
    groups, count = [], 0
    for group, runs in zip(state_dict["param_groups"], optimizer.runs, strict=True):
        groups.append({**group, "params": list(range(count, count + len(runs)))})
        for number, run in enumerate(runs, count):
            for index in run.indices:
                span = run.unit.layout.spans[index]
                for key, value in given[id(run.unit.params[index])].items():
                    state = states.setdefault(number, {})
                    if not isinstance(value, torch.Tensor) or not value.dim() or len(run.shape) != 1:
                        state[key] = value.clone() if isinstance(value, torch.Tensor) else value
                        continue
                    whole = state.setdefault(key, torch.zeros(run.param.numel(), dtype=value.dtype))
                    whole[span.offset - run.start : span.end - run.start] = value.reshape(-1)
        count += len(runs)
    return {"state": states, "param_groups": groups}
