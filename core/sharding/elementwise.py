"""Whether an optimizer treats each element alone, so that it may step any flat piece of a parameter.

Known classes are listed; any other is tried: three steps on a small matrix must give what three steps on its two
flattened halves give.
"""

from __future__ import annotations

import copy
from collections import defaultdict
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
    "LBFGS": "it keeps a history of whole-model vectors and runs the model again by a closure inside step",
    "SparseAdam": "it needs sparse gradients, and flat gradients are dense",
    "Adafactor": "it factors the second moment by rows and columns",
    "Muon": "it orthogonalises whole matrices",
    "Shampoo": "it preconditions by rows and columns",
}


def why_not_elementwise(optimizer: torch.optim.Optimizer) -> str:
    """Return why `optimizer` must see whole matrices; empty where it may step any flat piece."""
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE:
        return ""
    return WHOLE_MATRIX.get(kind.__name__) or _difference(optimizer)


def _with_params(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    # Not built anew: a custom class may have any constructor.
    probe = copy.copy(optimizer)
    probe.__dict__.pop("step", None)  # a scheduler's wrapper would step the original
    probe.__dict__.update(
        state=defaultdict(dict),
        param_groups=[{**{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}, "params": params}],
    )
    return probe


def probe_states(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """Return names and formats of the states that a first step keeps for each element; empty where it cannot tell."""
    param = torch.nn.Parameter(torch.ones(7))
    param.grad = torch.ones(7)
    probe = _with_params(optimizer, [param])
    probe.param_groups = [{**{key: value for key, value in group.items() if key != "params"}, "params": [param]}]
    try:
        probe.step()
    except Exception:  # noqa: BLE001 - foreign code on a vector of its own: the first real step tells
        return {}
    state = probe.state.get(param, {})
    return {key: value.dtype for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == (7,)}


def _difference(optimizer: torch.optim.Optimizer) -> str:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 8, generator=generator)
    grads = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    whole = torch.nn.Parameter(start.clone())
    pieces = [torch.nn.Parameter(start.flatten()[:19].clone()), torch.nn.Parameter(start.flatten()[19:].clone())]
    try:
        _steps(_with_params(optimizer, [whole]), [whole], [[grad] for grad in grads])
        _steps(_with_params(optimizer, [*pieces]), pieces, [[g.flatten()[:19], g.flatten()[19:]] for g in grads])
    except Exception as error:  # noqa: BLE001 - any failure of foreign code means that it cannot step flat pieces
        return f"it failed on a flattened piece of a matrix: {type(error).__name__}: {error}"
    apart = (whole.detach().flatten() - torch.cat([piece.detach() for piece in pieces])).abs().max().item()
    if apart > 1e-5:
        return f"on flattened pieces of a 6x8 matrix it gives weights that differ by {apart:.2g}"
    return ""


def _steps(optimizer: torch.optim.Optimizer, params: list[Any], grads: list[list[torch.Tensor]]) -> None:
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
