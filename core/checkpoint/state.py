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

from distui.core import ops
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.flat import LoadPlanner
from distui.core.errors import UserError

if TYPE_CHECKING:
    from distui.core.engine import Engine


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
    for index, model in enumerate(engine._models):
        items |= _under(f"model{index}", engine.backend.model_items(model, part))
    for index, optimizer in enumerate(engine._optimizers):
        items |= _under(f"optimizer{index}", engine.backend.optimizer_items(optimizer, part))
    return items


def _under(prefix: str, items: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": item for name, item in items.items()}


def facts(engine: Engine) -> dict[str, object]:
    """Return what the manifest tells of the run and of the tensors' shapes."""
    return {
        "step": engine.clock.step,
        "world_size": engine.num_processes,
        "backend": engine.backend.name,
        "zero_stage": engine.config.strategy.zero_stage,
        "dtype": engine.config.precision.dtype,
        "shapes": {
            f"model{index}.{name}": shape
            for index, model in enumerate(engine._models)
            for name, shape in engine.backend.param_shapes(model).items()
        },
        "buffer_shapes": {
            f"model{index}.{name}": list(buffer.shape)
            for index, model in enumerate(engine._models)
            for name, buffer in model.named_buffers()
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


def load(engine: Engine, input_dir: str, *, optimizers: bool = True) -> None:
    """Bring the engine to the state in `input_dir`. Collective; any earlier stage and number of ranks will do.

    Without `optimizers` their states and groups stay as they are.
    """
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
    items: dict[str, Any] = {}
    for index, model in enumerate(engine._models):
        items |= _under(f"model{index}", engine.backend.model_items(model, None))
    missing = sorted(set(items) - set(saved))
    if missing:
        raise UserError(
            f"the checkpoint {source} is of another model",
            f"it has nothing for {len(missing)} of {len(items)} tensors, such as {missing[0]}",
            "build the same model that was saved",
        )
    for index, optimizer in enumerate(engine._optimizers if optimizers else []):
        prefix = f"optimizer{index}"
        own = {key.removeprefix(f"{prefix}."): meta for key, meta in saved.items() if key.startswith(f"{prefix}.")}
        engine.backend.allocate_states(optimizer, own)
        items |= _under(prefix, engine.backend.optimizer_items(optimizer, None))
    quieten_dcp()
    dcp.load(items, checkpoint_id=source, planner=LoadPlanner(), no_dist=engine.num_processes == 1)
    for model in engine._models:
        engine.backend.loaded(model)
    common = torch.load(source / "state.pt", weights_only=True)
    _load_common(engine, common, optimizers)
    own_file = source / f"rank{engine.process_index}.pt"
    kept = torch.load(own_file if own_file.exists() else source / "rank0.pt", weights_only=True, map_location="cpu")
    if own_file.exists():
        _set_random_states(kept["random"])
    if optimizers:
        _load_onebit(engine, kept.get("onebit", []))
    if dist.is_initialized():
        engine.wait_for_everyone()


def onebit_states(engine: Engine) -> list[dict[str, Any] | None]:
    """Return what 1-bit Adam keeps on this rank, for each optimizer; None where it has none."""
    held = [getattr(optimizer, "onebit", None) for optimizer in engine._optimizers]
    return [onebit.state_dict() if onebit is not None else None for onebit in held]


def _load_onebit(engine: Engine, saved: list[dict[str, Any] | None]) -> None:
    for index, optimizer in enumerate(engine._optimizers):
        onebit = getattr(optimizer, "onebit", None)
        if onebit is not None:
            onebit.load_state_dict(saved[index] if index < len(saved) else None)


def _load_common(engine: Engine, common: dict[str, Any], optimizers: bool) -> None:
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
    if not optimizers:
        return
    if engine.scaler is not None and common["scaler"] is not None:
        engine.scaler.load_state_dict(common["scaler"])
    for optimizer, groups in zip(engine._optimizers, common["groups"], strict=True):
        for group, state in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in state.items() if key not in ("fused", "foreach")})
