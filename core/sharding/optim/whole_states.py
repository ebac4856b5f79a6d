"""An optimizer's states as plain torch has them: whole, in the parameters' shapes, whatever a rank holds of them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks.meeting import meet
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.homes.home import CellSlice
from distui.core.sharding.optim.matrices import WholeMatrices
from distui.core.sharding.optim.prepared import prefer_fused
from distui.core.sharding.optim.runs import FlatRun, kind_of_state
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.unit import Unit


class Steps(Protocol):
    """What of a `ShardedOptimizer` is read here."""

    inner: torch.optim.Optimizer
    runs: list[list[FlatRun]]
    given: list[list[Any]]
    place: dict[int, tuple[Unit, int]]
    units: list[Unit]
    transport: Transport | None
    matrices: WholeMatrices | None
    cuts: Cuts | None

    def state_of(self, run: FlatRun) -> dict[str, Any]:
        """Return a run's states, or where they rest."""

    def split_runs(self, alike: Any) -> None:
        """Cut runs into parameters that are alike."""


Held = dict[tuple[int, str], tuple[torch.Size | None, int, Any]]
"""By a parameter's number and a state's key: the whole shape, where this rank's part begins, and that part, flat. Of a
number without a shape, that number."""


def lies_in_parts(optimizer: Steps) -> bool:
    """Tell whether ranks hold parts of the states, so that all of them must be asked for one."""
    return any(unit.placement.shards_optimizer for unit in optimizer.units)


def whole_state_dict(optimizer: Steps) -> dict[str, Any]:
    """Return the `state_dict` of the script's own optimizer; tensors that had to be gathered are on the CPU.

    Collective where ranks hold parts: all ranks, outside of a backward. Else tensors are views of the states.

    Raises: UserError where a rank does not come.
    """
    _refuse_stages(optimizer)
    held = _held(optimizer)
    states: dict[int, dict[str, Any]] = defaultdict(dict)
    params = [param for group in optimizer.given for param in group]
    groups = {_group_of(optimizer, param): None for param in params}  # in one order on all ranks
    for group in groups:
        if group is not None:
            meet(f"{type(optimizer.inner).__name__}.state_dict()", group)
        own = {place: of for place, of in held.items() if _group_of(optimizer, params[place[0]]) is group}
        if group is not None:
            for number, key, value in _gathered(own, group):
                states[number][key] = value
            continue
        for (number, key), (shape, _, value) in own.items():
            states[number][key] = value if shape is None else value.view(shape)
    if optimizer.cuts is not None:
        for number, state in sorted(states.items()):
            for key, value in sorted(state.items()):
                cut = optimizer.cuts.get(params[number])
                if cut is not None and isinstance(value, torch.Tensor) and tuple(value.shape) == cut.local_shape:
                    state[key] = optimizer.cuts.assemble(params[number], value)
    others = {key: state for key, state in optimizer.inner.state.items() if not isinstance(key, torch.Tensor)}
    kept = optimizer.inner.state
    # torch's own, so that hooks and what a class adds to it are there.
    optimizer.inner.state = defaultdict(dict, {params[number]: state for number, state in states.items()} | others)
    try:
        return optimizer.inner.state_dict()
    finally:
        optimizer.inner.state = kept


def _group_of(optimizer: Steps, param: Any) -> dist.ProcessGroup | None:
    """Return the ranks that have parts of the states of `param`; None where this one has them whole."""
    unit, _ = optimizer.place.get(id(param), (None, 0))
    if unit is None or not unit.placement.shards_optimizer or unit.transport is None:
        return None
    return unit.transport.group


def _held(optimizer: Steps) -> Held:
    params = [param for group in optimizer.given for param in group]
    numbers = {id(param): number for number, param in enumerate(params)}
    held: Held = {}
    for run in (run for runs in optimizer.runs for run in runs):
        for key, value in optimizer.state_of(run).items():
            for index in run.indices:
                place = numbers[id(run.unit.params[index])], key
                if not isinstance(value, torch.Tensor | CellSlice) or not value.dim():
                    # Each its own: torch's optimizers count the steps of every parameter in place.
                    held[place] = None, 0, value.clone() if isinstance(value, torch.Tensor) else value
                elif isinstance(value, torch.Tensor) and (run.is_owned or value.shape != run.shape or value.dim() != 1):
                    if not run.is_owned and lies_in_parts(optimizer):
                        why = f"{key} has the shape {tuple(value.shape)}, of several parameters in a row"
                        raise UserError(f"{type(optimizer.inner).__name__}.state_dict()", why, "use engine.save_state")
                    held[place] = value.shape, 0, value.reshape(-1)
                else:
                    at, low, high = _cut(run, index)
                    end = at + high - low
                    part = value.part(at, end).read() if isinstance(value, CellSlice) else value[at:end]
                    held[place] = torch.Size(run.unit.layout.spans[index].shape), low, part
    return held


def _cut(run: FlatRun, index: int) -> tuple[int, int, int]:
    """Return where in a flat run a parameter's elements begin, and which of its elements [low, high) those are."""
    span = run.unit.layout.spans[index]
    base = run.unit.layout.shard(run.unit.rank)[0] + run.start
    low, high = max(span.offset, base), min(span.end, base + run.end - run.start)
    return low - base, low - span.offset, high - span.offset


def _gathered(held: Held, group: dist.ProcessGroup) -> Iterator[tuple[int, str, Any]]:
    """Yield every rank's states, whole. Collective."""
    own = {
        place: (shape, value.dtype if shape is not None else None, None if shape is not None else value)
        for place, (shape, _, value) in held.items()
    }
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, own, group=group)
    known = {place: found for states in reversed(of_ranks) for place, found in states.items()}
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    for place in sorted(known):
        shape, dtype, number = known[place]
        if shape is None:
            yield *place, number
            continue
        # As bytes, whose sum with zeros is exact in every format.
        content = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
        if place in held:
            _, start, part = held[place]
            content.view(dtype)[start : start + part.numel()] = part
        dist.all_reduce(content, group=group)
        yield *place, content.cpu().view(dtype).view(shape)


def _refuse_stages(optimizer: Steps) -> None:
    if optimizer.cuts is not None and optimizer.cuts.elsewhere:
        raise UserError(
            f"state_dict of {type(optimizer).__name__} in a pipeline",
            f"each of {optimizer.cuts.num_ranks} stages has the states of its own blocks",
            "use engine.save_state and engine.load_state, whose files any layout reads",
        )


def load_whole(optimizer: Steps, state_dict: dict[str, Any]) -> None:
    """Take what `whole_state_dict` returned, at whatever stage and number of ranks, or a plain optimizer's.

    The inner optimizer's groups must hold its runs. Parameters go by their order, or by name where they have names.

    Raises: UserError for states that are not of these parameters, before anything is changed.
    """
    _refuse_stages(optimizer)
    hooks = optimizer.inner._optimizer_load_state_dict_pre_hooks
    for hook in hooks.values():
        changed = hook(optimizer.inner, state_dict)
        state_dict = state_dict if changed is None else changed
    given = _by_parameter(optimizer, state_dict)
    optimizer.split_runs(lambda run: [kind_of_state(given.get(id(run.unit.params[i]), {})) for i in run.indices])
    for group, runs in zip(optimizer.inner.param_groups, optimizer.runs, strict=True):
        group["params"] = [run.param for run in runs]
    numbered = list(enumerate(run for runs in optimizer.runs for run in runs))
    states: dict[Any, Any] = {number: _of_run(run, given, optimizer.cuts) for number, run in numbered}
    numbers = {id(run): number for number, run in numbered}
    groups = [
        {**group, "params": [numbers[id(run)] for run in runs]}
        for group, runs in zip(state_dict["param_groups"], optimizer.runs, strict=True)
    ]
    known = {number for group in state_dict["param_groups"] for number in group["params"]}
    others = {key: value for key, value in state_dict["state"].items() if key not in known}
    states = {number: state for number, state in states.items() if state} | others
    with _called_already(optimizer.inner):
        optimizer.inner.load_state_dict({**state_dict, "state": states, "param_groups": groups})
    for group in optimizer.inner.param_groups:
        prefer_fused(group)


@contextlib.contextmanager
def _called_already(inner: torch.optim.Optimizer) -> Iterator[None]:
    hooks = inner._optimizer_load_state_dict_pre_hooks
    inner._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        inner._optimizer_load_state_dict_pre_hooks = hooks


def _by_parameter(optimizer: Steps, state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the states in `state_dict` by the parameter's identity, each compared with its shape."""
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != [len(params) for params in optimizer.given]:
        raise _refusal(
            f"it has groups of {sizes} parameters, and the optimizer has {[len(params) for params in optimizer.given]}"
        )
    found: dict[int, dict[str, Any]] = {}
    for group, params in zip(state_dict["param_groups"], optimizer.given, strict=True):
        names = [_name(optimizer, param) for param in params]
        order = names if all(isinstance(number, str) for number in group["params"]) else group["params"]
        if set(order) != set(group["params"]):
            lacking = sorted(set(order) ^ set(group["params"]))
            raise _refusal(f"{', '.join(lacking[:4])} are named by one and not by the other")
        for number, name, param in zip(order, names, params, strict=True):
            state = state_dict["state"].get(number, {})
            if state and (id(param) not in optimizer.place or not optimizer.place[id(param)][0].trainable):
                raise _refusal(f"it has states of {name}, which is frozen and so not stepped here")
            if state:
                _refuse_other_shapes(optimizer, name, param, state)
                found[id(param)] = state
    return found


def _refuse_other_shapes(optimizer: Steps, name: str, param: Any, state: dict[str, Any]) -> None:
    unit, index = optimizer.place[id(param)]
    matrices = [] if optimizer.matrices is None else optimizer.matrices.matrices
    held = [run for runs in optimizer.runs for run in runs if run.unit is unit and index in run.indices]
    if any(matrix.unit is unit and matrix.index == index for matrix in matrices) or not all(map(_is_flat, held)):
        return  # stepped whole, and its states may have other shapes
    cut = optimizer.cuts.get(param) if optimizer.cuts is not None else None
    shape = torch.Size(unit.layout.spans[index].shape if cut is None else cut.shape)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != shape:
            raise _refusal(f"{key} of {name} has the shape {tuple(value.shape)}, and the parameter {tuple(shape)}")


def _is_flat(run: FlatRun) -> bool:
    return not run.is_owned and len(run.shape) == 1


def _name(optimizer: Steps, param: Any) -> str:
    unit, index = optimizer.place.get(id(param), (None, 0))
    return unit.param_names[index] if unit is not None else "a frozen parameter"


def _of_run(run: FlatRun, given: dict[int, dict[str, Any]], cuts: Cuts | None) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for index in run.indices:
        for key, value in given.get(id(run.unit.params[index]), {}).items():
            if cuts is not None and isinstance(value, torch.Tensor):
                value = cuts.take(run.unit.params[index], value)
            if not isinstance(value, torch.Tensor) or not value.dim() or not _is_flat(run):
                state[key] = value.clone() if isinstance(value, torch.Tensor) else value
                continue
            at, low, high = _cut(run, index)
            flat = state.setdefault(key, torch.zeros(run.end - run.start, dtype=value.dtype, device=value.device))
            flat[at : at + high - low] = value.reshape(-1)[low:high]
    return state


def _refusal(why: str) -> UserError:
    return UserError(
        "the state_dict is not of this optimizer's parameters",
        why,
        "give it what optimizer.state_dict() returns here or in plain torch for the same groups; "
        "engine.load_state reads checkpoints",
    )
