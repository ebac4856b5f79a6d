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
        is_cut = unit.counted is not None
        in_parts = (
            is_cut or unit.placement.shards_optimizer or optimizer.stream is not None or optimizer.flat is not None
        )
        run = self._run_of(param)
        if run is None or in_parts:
            stage, num_ranks = unit.placement.stage, unit.placement.num_ranks
            parts = f"at zero_stage={stage} on {num_ranks} ranks the states lie in flat ranges of several parameters"
            parts = "tensor-parallel ranks have pieces of the states" if is_cut else parts
            raise UserError(
                f"optimizer.state[{unit.param_names[index]}] cannot be had",
                parts if in_parts else "the optimizer does not step this parameter",
                "read optimizer.state_dict() on all ranks, or go over optimizer.state.values() and change all alike",
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
