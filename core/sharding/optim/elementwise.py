"""How much of a parameter an optimizer must see to step it: any flat piece, the whole tensor, or more than a rank has.

Known classes are listed; any other is tried on small matrices, each parameter group with its own settings: three steps
on a matrix must give what three steps on each of its two flattened halves give; if not, three steps on two matrices
must give what three steps on each alone give.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ELEMENTWISE = {
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
}
WHOLE_MATRIX = {
    "Adafactor": "it factors the second moment by rows and columns",
    "Muon": "it orthogonalises whole matrices",
}
REFUSED = {
    "LBFGS": "it keeps a history of whole-model vectors and runs the model again by a closure inside step",
    "SparseAdam": "it needs sparse gradients, and flat gradients are dense",
}
_COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_tensor",
}


_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


@dataclass(frozen=True, slots=True)
class Sight:
    """What an optimizer needs to see of a parameter group."""

    flat: bool
    """Whether it may step any flat piece of a parameter."""
    why_not_flat: str = ""
    why_not_whole: str = ""
    """Why whole tensors are not enough where each is on one rank only; empty where they are."""
    why_never: str = ""
    """Why it cannot work at all."""


def sight_of(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Sight:
    """Return what `optimizer` must see of the parameters in `group`."""
    kind = type(optimizer)
    name = kind.__name__
    if name in REFUSED:
        return Sight(False, why_never=REFUSED[name])
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return Sight(False, why_never="its step was replaced on the object, by what cannot be tried on pieces")
    if inspect.signature(kind.step).parameters.get("closure", _NO_CLOSURE).default is inspect.Parameter.empty:
        return Sight(False, why_never="its step needs a closure, which runs the model again inside")
    if kind.__module__.startswith("torch.optim"):
        if name in ELEMENTWISE:
            return Sight(True)
        if name in WHOLE_MATRIX:
            return Sight(False, WHOLE_MATRIX[name])
    if kept := _kept_parameters(optimizer, group):
        return Sight(False, why_never=f"it keeps the parameters in its {kept}, and steps others: pieces and copies")
    apart = _named_attributes(kind, group) or _difference_in_pieces(optimizer, group)
    if not apart:
        return Sight(True)
    code = getattr(inspect.unwrap(kind.step), "__code__", None)
    called = sorted(_COLLECTIVES.intersection(code.co_names if code is not None else ()))
    if called:
        alone = f"its step runs collectives of its own ({', '.join(called)}); take its single-device form"
    else:
        alone = _difference_alone(optimizer, group)
    return Sight(False, apart, alone)


def _kept_parameters(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str:
    """Return the name of an attribute of its own in which an optimizer has parameters, or what is known of each."""
    identities = {id(param) for param in group["params"]}

    def names(item: Any) -> bool:
        return id(item) in identities or (type(item) is int and item in identities)

    def holds(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(names(key) for key in value) or holds(list(value.values()))
        return isinstance(value, (list, tuple, set, frozenset)) and any(names(item) or holds(item) for item in value)

    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    return next((name for name, value in own.items() if holds(value)), "")


def _named_attributes(kind: type, group: dict[str, Any]) -> str:
    """Return why `kind` must see parameters themselves: it names an attribute that the script gave some of them."""
    given = {name for param in group["params"] for name in vars(param)}
    if not given:
        return ""
    words: set[str] = set()
    for name in {base.__module__ for base in kind.__mro__} - {"builtins"}:
        if name.startswith("torch."):
            continue
        try:
            words.update(re.findall(r"\w+", inspect.getsource(sys.modules[name])))
        except (KeyError, OSError, TypeError):  # made in a notebook, say: it may name any
            words |= given
    named = sorted(given & words)
    return f"its module names what the script gave parameters as attributes: {', '.join(named)}" if named else ""


def why_not_elementwise(optimizer: torch.optim.Optimizer) -> str:
    """Return why `optimizer` must see whole matrices; empty where it may step any flat piece."""
    sights = [sight_of(optimizer, group) for group in optimizer.param_groups]
    return next((sight.why_never or sight.why_not_flat for sight in sights if not sight.flat), "")


def _with_params(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], params: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    # Not built anew: a custom class may have any constructor.
    probe = copy.copy(optimizer)
    probe.__dict__.pop("step", None)  # a scheduler's wrapper would step the original
    options = {key: value for key, value in group.items() if key != "params"}
    probe.__dict__.update(state=defaultdict(dict), param_groups=[{**options, "params": params}])
    return probe


def probe_states(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """Return names and formats of the states that a first step keeps for each element; empty where it cannot tell."""
    param = torch.nn.Parameter(torch.ones(7))
    param.grad = torch.ones(7)
    probe = _with_params(optimizer, group, [param])
    try:
        probe.step()
    except Exception:  # noqa: BLE001 - foreign code on a vector of its own: the first real step tells
        return {}
    state = probe.state.get(param, {})
    return {key: value.dtype for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == (7,)}


def _stepped(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], starts: list[torch.Tensor], grads: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return what `starts` become by one step for each entry of `grads`."""
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    for param in params:
        for like in group["params"]:
            vars(param).update(vars(like))
    probe = _with_params(optimizer, group, params)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        probe.step()
    return [param.detach() for param in params]


def _apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((one.flatten() - other.flatten()).abs().max().item() for one, other in pairs)


def _matrices(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(rows, columns, generator=generator) for rows, columns in ((6, 8), (8, 4))[:count]]


_LARGEST = 256
"""What a script's own optimizer may take for large in a dimension is seen up to here."""


def _difference_in_pieces(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str:
    own = {tuple(min(size, _LARGEST) for size in param.shape) for param in group["params"] if param.numel() > 11}
    largest = sorted(own, key=math.prod)[-4:]  # some treat large tensors otherwise
    for shape in ((6, 8), (19,), (4, 3, 3, 3), (4, 6, 3), *largest):
        if apart := _difference_in_pieces_of(optimizer, group, shape):
            return apart
    return ""


def _difference_in_pieces_of(optimizer: torch.optim.Optimizer, group: dict[str, Any], shape: tuple[int, ...]) -> str:
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
    kind = f"a {'x'.join(map(str, shape))} {'matrix' if len(shape) == 2 else 'tensor'}"

    def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.flatten()[:11], tensor.flatten()[11:]]

    try:
        whole = _stepped(optimizer, group, [start], [[grad] for grad in grads])
        # Each by itself: a rank has one of them, and must not need the other's gradient.
        halves = [
            _stepped(optimizer, group, [piece], [[pieces(grad)[half]] for grad in grads])[0]
            for half, piece in enumerate(pieces(start))
        ]
        second = _stepped(optimizer, group, [start, start], [[grad, grad] for grad in grads])[1:]
    except Exception as error:  # noqa: BLE001 - any failure of foreign code means that it cannot step flat pieces
        return f"it failed on a flattened piece of {kind}: {type(error).__name__}: {error}"
    apart = _apart(second, whole)
    if apart > 1e-5:
        return f"{kind} that comes second in its group is stepped otherwise: it differs by {apart:.2g}"
    apart = _apart([torch.cat(halves)], whole)
    return f"on flattened pieces of {kind} it gives weights that differ by {apart:.2g}" if apart > 1e-5 else ""


def _difference_alone(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str:
    generator = torch.Generator().manual_seed(0)
    starts = _matrices(2, generator)
    grads = [_matrices(2, generator) for _ in range(3)]
    try:
        together = _stepped(optimizer, group, starts, grads)
        alone = []
        for index, start in enumerate(starts):
            alone += _stepped(optimizer, group, [start], [[step_grads[index]] for step_grads in grads])
    except Exception as error:  # noqa: BLE001 - any failure of foreign code means that it cannot be used like this
        return f"it failed on a 6x8 and an 8x4 matrix: {type(error).__name__}: {error}"
    apart = _apart(alone, together)
    return f"its step of a matrix depends on the others: it differs by {apart:.2g}" if apart > 1e-5 else ""
