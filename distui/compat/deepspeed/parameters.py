"""What scripts ask of a parameter under ZeRO-3: `ds_id`, `ds_status`, `ds_tensor`, `ds_shape`, `ds_persist`, ...

Answers of the moment, for parameters of a DeepSpeedEngine at stage 3; others have none, as with DeepSpeed.
"""

from __future__ import annotations

import itertools
import weakref
from enum import Enum
from typing import Any

import torch
from torch import nn

from distui.compat.whole import local_part
from distui.core.sharding.units.guarded import ANSWERS, place_of
from distui.core.sharding.units.states import ParamState


class ZeroParamStatus(Enum):
    """Whether a parameter is whole on this rank."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_STATUS = {
    ParamState.WHOLE: ZeroParamStatus.AVAILABLE,
    ParamState.ABSENT: ZeroParamStatus.NOT_AVAILABLE,
    ParamState.ARRIVING: ZeroParamStatus.INFLIGHT,
}
_ids = itertools.count()
_known: dict[int, tuple[int, str, weakref.ref[Any]]] = {}
"""Identity of a parameter -> its number, its name, its engine."""


def tell_of(engine: Any, model: nn.Module) -> None:
    """Answer for the parameters of a model that `engine`, a DeepSpeedEngine, prepared."""
    if engine.zero_optimization_stage() < 3:
        return
    named = list(nn.Module.named_parameters(model))
    for name, param in named:
        _known[id(param)] = (next(_ids), name, weakref.ref(engine))
    weakref.finalize(engine, _forget, [id(param) for _, param in named])
    ANSWERS.update(
        ds_id=lambda param: _of(param)[0],
        ds_shape=lambda param: _of(param) and param.shape,
        ds_numel=lambda param: _of(param) and param.numel(),
        ds_status=lambda param: _STATUS[_unit(param).residence.state],
        ds_persist=lambda param: not _unit(param).placement.shards_parameters,
        ds_tensor=_part,
        ds_summary=lambda param: lambda *args, **kwargs: _summary(param),
    )


def _forget(identities: list[int]) -> None:
    for identity in identities:
        found = _known.get(identity)
        if found is not None and found[2]() is None:
            del _known[identity]


def _of(param: Any) -> tuple[int, str, Any]:
    number, name, reference = _known.get(id(param), (0, "", lambda: None))
    engine = reference()
    if engine is None or place_of(param) is None:
        raise AttributeError("ds_id: only parameters of a DeepSpeedEngine at stage 3 have it")
    return number, name, engine


def _unit(param: Any) -> Any:
    _of(param)
    place = place_of(param)
    assert place is not None
    return place[0]


def _part(param: Any) -> torch.Tensor:
    """Return this rank's flat range in the parameter's format; unlike DeepSpeed's it is not padded.

    A copy that cannot be written: `safe_set_local_fp32_param` writes.
    """
    _, name, engine = _of(param)
    local = local_part(engine.engine.backend.model_items(engine.module, None)[name])
    with torch.inference_mode():  # where writing raises, since it would change nothing
        found = torch.empty(0, dtype=param.dtype) if local is None else local.detach().to(param.dtype, copy=True)
    found.ds_numel = found.numel()  # type: ignore[attr-defined]
    return found


def _summary(param: Any) -> dict[str, Any]:
    part = param.ds_tensor
    return {
        "id": param.ds_id,
        "status": param.ds_status.name,
        "numel": param.numel(),
        "ds_numel": param.ds_numel,
        "shape": tuple(param.shape),
        "ds_shape": tuple(param.ds_shape),
        "requires_grad": param.requires_grad,
        "persist": param.ds_persist,
        "ds_tensor.shape": part.shape,
    }
