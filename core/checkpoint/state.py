"""What a checkpoint holds, and how an engine's state goes into it and out of it.

<folder>/manifest.json      facts, and size and checksum of every file; written last
<folder>/*.distcp, .metadata  parameters, optimizer states and buffers (torch.distributed.checkpoint), flattened
<folder>/state.pt           schedulers, scaler, loaders, registered objects, parameter groups
<folder>/rank<R>.pt         random states of rank R
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from distui.core import ops
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.flat import FlatShard
from distui.core.errors import UserError
from distui.core.sharding.optim import FlatRun, ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.unit import Unit

if TYPE_CHECKING:
    from distui.core.engine import Engine


def _sharded_models(engine: Engine) -> list[ShardedModel]:
    from distui.core.backends.native import NativeBackend

    if not isinstance(engine.backend, NativeBackend):
        raise UserError(
            f"save_state does not know the backend {engine.backend.name!r}",
            "only the native engine's shards can be written",
            "use strategy.backend='native'",
        )
    return [engine.backend.sharded(model) for model in engine._models]


Part = tuple[int, int]
"""Which of how many equal parts a rank writes of what every rank holds; load has none and takes the whole."""


def _held(unit: Unit, index: int, base: int, end: int, part: Part | None) -> tuple[int, int]:
    """Return the range of parameter `index` that lies in [base, end) of the unit's flat buffer and is this rank's."""
    span = unit.layout.spans[index]
    if part is not None and unit.layout.num_shards == 1:
        rank, count = part
        base = max(base, unit.layout.padded_numel * rank // count)
        end = min(end, unit.layout.padded_numel * (rank + 1) // count)
    low = min(max(base - span.offset, 0), span.numel)
    return low, min(max(end - span.offset, low), span.numel)


def _replicated(tensor: torch.Tensor, part: Part | None) -> FlatShard:
    """Return a tensor that every rank holds; rank 0 writes it, so that what belongs together is of one rank."""
    flat = tensor.detach().reshape(-1)
    return FlatShard(flat[:0] if part is not None and part[0] else flat, 0, tensor.numel())


def _model_items(prefix: str, sharded: ShardedModel, part: Part | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by key: flat shards of what is in units, plain tensors of the rest."""
    items: dict[str, torch.Tensor] = {}
    in_units: set[int] = set()
    for unit in sharded.units:
        source = unit.master if unit.trainable else unit.shard
        base, end = unit.layout.shard(unit.rank)
        for index, (name, param) in enumerate(zip(unit.param_names, unit.params, strict=True)):
            in_units.add(id(param))
            low, high = _held(unit, index, base, end, part)
            at = unit.layout.spans[index].offset + low - base
            local = source[at : at + high - low] if high > low else source[:0]
            items[f"{prefix}.{name}"] = FlatShard(local, low, param.numel())
    for name, param in nn.Module.named_parameters(sharded.model):
        if id(param) not in in_units:
            items[f"{prefix}.{name}"] = _replicated(param, part)
    for name, buffer in sharded.model.named_buffers():
        items[f"{prefix}.{name}"] = _replicated(buffer, part)
    return items


def _optimizer_items(prefix: str, optimizer: ShardedOptimizer, part: Part | None = None) -> dict[str, torch.Tensor]:
    """Return optimizer states by key: `<prefix>.<parameter>.<state>`, flat shards or whole scalars."""
    items: dict[str, torch.Tensor] = {}
    for runs in optimizer.runs:
        for run in runs:
            state = optimizer.state_of(run)
            for key, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                for name, index in _params_of(run):
                    items[f"{prefix}.{name}.{key}"] = _state_item(run, index, value, part)
    return items


def _params_of(run: FlatRun) -> list[tuple[str, int]]:
    return [(run.unit.param_names[index], index) for index in run.indices]


def _state_item(run: FlatRun, index: int, value: torch.Tensor, part: Part | None) -> torch.Tensor:
    if not value.dim():
        return value
    span = run.unit.layout.spans[index]
    base = run.unit.layout.shard(run.unit.rank)[0] + run.start
    low, high = _held(run.unit, index, base, base + run.end - run.start, part)
    at = span.offset + low - base
    flat = value.reshape(-1)
    return FlatShard(flat[at : at + high - low] if high > low else flat[:0], low, span.numel)


def random_states() -> dict[str, Any]:
    """Return the states of this rank's random generators."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    version, internal, gauss = random.getstate()
    states["python"] = [version, list(internal), gauss]
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states["numpy"] = [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached]
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def quieten_dcp() -> None:
    """Ignore two warnings of torch.distributed.checkpoint: one process is what we ask for, and the other is its own.

    For good, not for a while: the filters are the process's, and a save may run on a thread beside the script's own.
    """
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
    warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")


def items_to_save(engine: Engine) -> dict[str, torch.Tensor]:
    """Return what this rank writes of models and optimizers, by key, in the memory that training uses."""
    part = (engine.process_index, engine.num_processes)
    items: dict[str, torch.Tensor] = {}
    for index, sharded in enumerate(_sharded_models(engine)):
        sharded.schedule.finish_gathers()
        items.update(_model_items(f"model{index}", sharded, part))
    for index, optimizer in enumerate(engine._optimizers):
        assert isinstance(optimizer, ShardedOptimizer)
        items.update(_optimizer_items(f"optimizer{index}", optimizer, part))
    return items


def facts(engine: Engine) -> dict[str, object]:
    """Return what the manifest tells of the run and of the tensors' shapes."""
    models = _sharded_models(engine)
    return {
        "step": engine.clock.step,
        "world_size": engine.num_processes,
        "zero_stage": engine.config.strategy.zero_stage,
        "dtype": engine.config.precision.dtype,
        "shapes": {
            f"model{index}.{name}": list(param.shape)
            for index, sharded in enumerate(models)
            for name, param in nn.Module.named_parameters(sharded.model)
        },
        "buffer_shapes": {
            f"model{index}.{name}": list(buffer.shape)
            for index, sharded in enumerate(models)
            for name, buffer in sharded.model.named_buffers()
        },
    }


def common_state(engine: Engine) -> dict[str, Any]:
    """Return what all ranks share."""
    return {
        "step": engine.clock.step,
        "schedulers": [scheduler.state_dict() for scheduler in engine._schedulers],
        "loaders": [loader.state_dict() for loader in engine._loaders],
        "scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
        "registered": [value.state_dict() for value in engine._registered],
        "groups": [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in engine._optimizers
        ],
    }


def load(engine: Engine, input_dir: str) -> None:
    """Bring the engine to the state in `input_dir`. Collective; any earlier stage and number of ranks will do."""
    source = folders.find(Path(input_dir).absolute())
    # Checked by one rank: a failed check must stop all of them, or the others would wait in the next collective.
    outcome: list[Any] = [None]
    if engine.is_main_process:
        try:
            folders.verify(source)
        except UserError as error:
            outcome = [(error.what, error.why, error.fix)]
    outcome = ops.broadcast_object(outcome)
    if outcome[0]:
        raise UserError(*outcome[0])
    reader = dcp.FileSystemReader(source)
    saved = reader.read_metadata().state_dict_metadata
    models = _sharded_models(engine)
    items: dict[str, Any] = {}
    for index, sharded in enumerate(models):
        items.update(_model_items(f"model{index}", sharded))
    missing = sorted(set(items) - set(saved))
    if missing:
        raise UserError(
            f"the checkpoint {source} is of another model",
            f"it has nothing for {len(missing)} of {len(items)} tensors, such as {missing[0]}",
            "build the same model that was saved",
        )
    for index, optimizer in enumerate(engine._optimizers):
        assert isinstance(optimizer, ShardedOptimizer)
        _allocate_states(f"optimizer{index}", optimizer, saved)
        items.update(_optimizer_items(f"optimizer{index}", optimizer))
    quieten_dcp()
    dcp.load(items, checkpoint_id=source, no_dist=engine.num_processes == 1)

    for optimizer in engine._optimizers:
        if isinstance(optimizer, ShardedOptimizer) and optimizer.flat is not None:
            optimizer.flat.narrow()
    for sharded in models:
        for unit in sharded.units:
            if unit.trainable:
                unit.publish()
        if sharded.schedule.slots is not None:
            sharded.schedule.slots.invalidate()
        sharded.schedule.finish_gathers()
    common = torch.load(source / "state.pt", weights_only=True)
    _load_common(engine, common)
    own = source / f"rank{engine.process_index}.pt"
    if own.exists():
        _set_random_states(torch.load(own, weights_only=True)["random"])
    if dist.is_initialized():
        engine.wait_for_everyone()


def _allocate_states(prefix: str, optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    """Make room for the states that the checkpoint has and the optimizer, not having stepped, lacks."""
    if optimizer.flat is not None:
        optimizer.flat.forget()
    for runs in optimizer.runs:
        for run in runs:
            state = optimizer.inner.state[run.param]
            for name, _ in _params_of(run):
                start = f"{prefix}.{name}."
                for key in [key for key in saved if key.startswith(start) and "." not in key[len(start) :]]:
                    meta = saved[key]
                    value = torch.zeros((), dtype=meta.properties.dtype) if not meta.size else None
                    if value is None:
                        value = torch.zeros_like(run.param.detach(), dtype=meta.properties.dtype)
                    state.setdefault(key[len(start) :], value)


def _load_common(engine: Engine, common: dict[str, Any]) -> None:
    engine.clock.step = common["step"]
    pairs: list[tuple[str, list[Any], list[Any]]] = [
        ("schedulers", engine._schedulers, common["schedulers"]),
        ("loaders", engine._loaders, common["loaders"]),
        ("registered objects", engine._registered, common["registered"]),
    ]
    for what, mine, saved in pairs:
        if len(mine) != len(saved):
            raise UserError(
                f"the checkpoint has {len(saved)} {what}, the engine {len(mine)}",
                "they are matched by the order in which they were prepared",
                "prepare the same objects as the script that saved it",
            )
        for value, state in zip(mine, saved, strict=True):
            value.load_state_dict(state)
    if engine.scaler is not None and common["scaler"] is not None:
        engine.scaler.load_state_dict(common["scaler"])
    for optimizer, groups in zip(engine._optimizers, common["groups"], strict=True):
        for group, state in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in state.items() if key not in ("fused", "foreach")})
