"""What a checkpoint holds, and how an engine's state goes into it and out of it.

<folder>/manifest.json      facts, and size and checksum of every file; written last
<folder>/*.distcp, .metadata  parameters, optimizer states and buffers (torch.distributed.checkpoint), flattened
<folder>/state.pt           schedulers, scaler, loaders, registered objects, parameter groups
<folder>/rank<R>.pt         random states of rank R
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
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


def _model_items(prefix: str, sharded: ShardedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by key: flat shards of what is in units, plain tensors of the rest."""
    items: dict[str, torch.Tensor] = {}
    in_units: set[int] = set()
    for unit in sharded.units:
        source = unit.master if unit.trainable else unit.shard
        base = unit.layout.shard(unit.rank)[0] if unit.layout.num_shards > 1 else 0
        for index, (name, param) in enumerate(zip(unit.param_names, unit.params, strict=True)):
            in_units.add(id(param))
            low, high = unit.layout.owned(index, unit.rank)
            at = unit.layout.spans[index].offset + low - base
            local = source[at : at + high - low] if high > low else source[:0]
            items[f"{prefix}.{name}"] = FlatShard(local, low, param.numel())
    for name, param in nn.Module.named_parameters(sharded.model):
        if id(param) not in in_units:
            items[f"{prefix}.{name}"] = FlatShard(param.detach().reshape(-1), 0, param.numel())
    for name, buffer in sharded.model.named_buffers():
        items[f"{prefix}.{name}"] = FlatShard(buffer.detach().reshape(-1), 0, buffer.numel())
    return items


def _optimizer_items(prefix: str, optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    """Return optimizer states by key: `<prefix>.<parameter>.<state>`, flat shards or whole scalars."""
    items: dict[str, torch.Tensor] = {}
    for runs in optimizer.runs:
        for run in runs:
            state = optimizer.inner.state.get(run.param, {})
            for key, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                for name, index in _params_of(run):
                    items[f"{prefix}.{name}.{key}"] = _state_item(run, index, value)
    return items


def _params_of(run: FlatRun) -> list[tuple[str, int]]:
    return [(run.unit.param_names[index], index) for index in run.indices]


def _state_item(run: FlatRun, index: int, value: torch.Tensor) -> torch.Tensor:
    if not value.dim():
        return value
    span = run.unit.layout.spans[index]
    base = run.unit.layout.shard(run.unit.rank)[0] + run.start
    low, high = max(span.offset, base), min(span.end, base + run.end - run.start)
    return FlatShard(value.reshape(-1)[low - base : high - base], low - span.offset, span.numel)


def _random_states() -> dict[str, Any]:
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


def _with_dcp(function: Callable[..., Any], items: dict[str, Any], folder: Path, alone: bool) -> None:
    with warnings.catch_warnings():
        # One process is what we ask for, and our tensors are what they say they are.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        function(items, checkpoint_id=folder, no_dist=alone)


def save(engine: Engine, output_dir: str) -> str:
    """Write the engine's whole state to `output_dir`. Collective. Returns the folder's path."""
    target = Path(output_dir).absolute()
    working = folders.working_folder(target)
    models = _sharded_models(engine)
    for sharded in models:
        sharded.schedule.finish_gathers()
    if engine.is_main_process:
        shutil.rmtree(working, ignore_errors=True)
        try:
            working.mkdir(parents=True)
        except OSError as error:
            problem: list[Any] = [str(error)]
        else:
            problem = [None]
    else:
        problem = [None]
    problem = ops.broadcast_object(problem)
    if problem[0]:
        raise UserError(f"cannot write the checkpoint {target}", problem[0], "choose another checkpoint.dir")

    items: dict[str, Any] = {}
    for index, sharded in enumerate(models):
        items.update(_model_items(f"model{index}", sharded))
    for index, optimizer in enumerate(engine._optimizers):
        assert isinstance(optimizer, ShardedOptimizer)
        items.update(_optimizer_items(f"optimizer{index}", optimizer))
    _with_dcp(dcp.save, items, working, engine.num_processes == 1)
    rank = engine.process_index
    torch.save({"random": _random_states()}, working / f"rank{rank}.pt")
    mine = [f"rank{rank}.pt"] + [path.name for path in working.glob(f"__{rank}_*.distcp")]
    if engine.is_main_process:
        torch.save(_common_state(engine), working / "state.pt")
        mine += ["state.pt", ".metadata"]
    files = ops.gather_object([folders.describe(working, mine)])
    if engine.is_main_process:
        facts: dict[str, object] = {
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
        folders.commit(target, {name: fact for part in files for name, fact in part.items()}, facts)
    engine.wait_for_everyone()
    return str(target)


def _common_state(engine: Engine) -> dict[str, Any]:
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
    _with_dcp(dcp.load, items, source, engine.num_processes == 1)

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
