"""The norm of gradients of which every rank holds a part."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.optim.onebit_adam import OneBitAdam
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.unit import Unit
from distui.kernels.l2_norm import l2_norm, norm_reference


class Steps(Protocol):
    """What an optimizer is to this file."""

    units: list[Unit]
    transport: Transport | None
    onebit: OneBitAdam | None
    grad_factor: float
    cuts: Cuts | None


LOOKED_AT = 2
"""In so many steps of the beginning gradients of whole parameters are compared over the ranks that cut the others."""


def check_whole_gradients(optimizer: Steps, num_steps: int) -> None:
    """Refuse gradients of whole parameters that differ between the ranks over which the others are cut. Collective.

    They would drift apart from step to step. Raises: UserError on all of those ranks, in the first steps.
    """
    cuts = optimizer.cuts
    cuts = cuts.tensor if cuts is not None and cuts.elsewhere else cuts
    if cuts is None or cuts.group is None or num_steps >= LOOKED_AT:
        return
    names, squares = [], []
    for unit in optimizer.units:
        whole = [index for index in range(len(unit.params)) if cuts.get(unit.params[index]) is None]
        if not unit.trainable or not whole or not unit.has_gradient:
            continue
        with unit.gradient() as grad:
            zero = torch.zeros((), dtype=torch.float64, device=grad.device)
            for index in whole:
                runs = unit.layout.runs([index], unit.rank)
                squares.append(sum((grad[start:end].double().square().sum() for start, end in runs), zero))
                names.append(unit.param_names[index])
    if not names:
        return
    total = torch.stack([square.to(optimizer.units[0].device) for square in squares])
    if optimizer.transport is not None and any(unit.placement.shards_optimizer for unit in optimizer.units):
        optimizer.transport.all_reduce(total).wait()
    ends = torch.stack([total, -total])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=cuts.group)
    most, least = ends[0].sqrt().tolist(), (-ends[1]).sqrt().tolist()
    for name, high, low in zip(names, most, least, strict=True):
        if high - low > 1e-3 * high + 1e-12 and math.isfinite(high):
            raise UserError(
                f"the gradient of {name} is another on each tensor-parallel rank",
                f"its norm is {low:.4g} on one and {high:.4g} on another of {cuts.num_ranks} ranks that hold it whole",
                f"it is used on what is cut: add the rule {name.rpartition('.')[0]}=replicated_with_grad_allreduce, or "
                "have the module before it be cut rowwise",
            )


def gradient_norm(optimizer: Steps, place: dict[int, set[int]] | None, norm_type: float) -> torch.Tensor:
    """Return the norm of the summed gradients at `place` (None: all), times the factor of the next step.

    What is cut over other axes is summed over them, and what ranks hold copies of counts once. Collective: all ranks
    (one number travels). Shapes: a scalar, on the shards' device.
    """
    units, cuts = optimizer.units, optimizer.cuts
    shards = optimizer.transport is not None and any(unit.placement.shards_optimizer for unit in units)
    device = units[0].device if units else torch.device("cpu")
    op = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
    # Where states are in shards, those who share them and who cut the rest have, together, each expert once. Else of
    # the rest each rank has everything; experts are its own, and others have the same beside it.
    apart = cuts.experts if cuts is not None and not shards else None
    own = units if apart is None or cuts is None else [unit for unit in units if not cuts.is_expert(unit.params[0])]
    total = _own_part(own, place, norm_type, device)
    if optimizer.onebit is not None and optimizer.onebit.frozen:
        total = optimizer.onebit.mean_norm(total, norm_type)
    elif shards and optimizer.transport is not None:
        optimizer.transport.all_reduce(total, op=op).wait()
        if (replicas := next((unit.replicas for unit in units if unit.replicas is not None), None)) is not None:
            replicas.agree(total)
    if cuts is not None and cuts.group is not None:
        dist.all_reduce(total, op=op, group=cuts.group)
    if apart is not None:
        experts = _own_part([unit for unit in units if unit not in own], place, norm_type, device)
        dist.all_reduce(experts, op=op, group=apart.group)
        total = torch.maximum(total, experts) if math.isinf(norm_type) else total + experts
    if not math.isinf(norm_type):
        total = total.pow(1.0 / norm_type)
    return total.float() * abs(optimizer.grad_factor)


def _own_part(
    units: list[Unit], place: dict[int, set[int]] | None, norm_type: float, device: torch.device
) -> torch.Tensor:
    """Return what this rank's shards of `units` give to a norm, before its root is taken."""
    parts = []
    for unit in units:
        if not unit.trainable or not unit.has_gradient:
            continue
        if place is None and norm_type == 2.0 and unit.stored_norm is not None and unit.counted is None:
            parts.append(unit.stored_norm)
            continue
        ranges = [(0, unit.layout.shard_numel)]
        if place is not None or unit.counted is not None:
            asked = range(len(unit.params)) if place is None else place.get(id(unit), ())
            counted = [index for index in asked if unit.counted is None or index in unit.counted]
            ranges = unit.layout.runs(counted, unit.rank)
        if not ranges:
            continue
        with unit.gradient() as grad:
            pieces = [grad[start:end] for start, end in ranges]
            if norm_type == 2.0:
                parts += [l2_norm(piece) for piece in pieces]
            else:
                parts += [norm_reference(piece, norm_type) for piece in pieces]
    norms = torch.stack(parts) if parts else torch.zeros(1, device=device)
    if math.isinf(norm_type):
        return norms.max()
    return norms.double().pow(norm_type).sum() if norms.device.type == "cpu" else norms.pow(norm_type).sum()
