"""What a checkpoint holds of an engine, and how it goes back into one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distui.core.checkpoint.fitting import Fit, fit
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.folder import Manifest
from distui.core.checkpoint.formats.opening import open_checkpoint
from distui.core.checkpoint.names import class_of, params_of_groups, tied_names, transient_names
from distui.core.checkpoint.reading import Checkpoint, Want, want
from distui.core.checkpoint.together import Failed, together
from distui.core.checkpoint.trained import Trained
from distui.core.data.loader import PreparedLoader
from distui.core.errors import UserError
from distui.core.ranks.random_states import RandomStates


def items_to_save(engine: Trained, without: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Return what this rank writes of models and optimizers, by key, in the memory that training uses.

    `without` are models (by number) whose weights somebody else keeps.
    """
    part = (engine.process_index, engine.num_processes)
    items: dict[str, Any] = {}
    for index, model in enumerate(engine._models):
        if index not in without:
            items |= _under(f"model{index}", engine.backend.model_items(model, part))
    for index, optimizer in enumerate(engine._optimizers):
        items |= _under(f"optimizer{index}", engine.backend.optimizer_items(optimizer, part))
    return items


def _under(prefix: str, items: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": item for name, item in items.items()}


def facts(engine: Trained, without: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Return what the manifest tells of the run, the tensors' shapes, and what is to be compared before loading."""
    found: dict[str, Any] = {
        "step": engine.clock.step,
        "world_size": engine.num_processes,
        "data_ranks": engine.num_data_ranks,
        "backend": engine.backend.name,
        "zero_stage": engine.config.strategy.zero_stage,
        "dtype": engine.config.precision.dtype,
        "models": len(engine._models),
        "without": sorted(without),
        "optimizers": [
            {"class": class_of(optimizer), "params": params_of_groups(optimizer)} for optimizer in engine._optimizers
        ],
        "schedulers": [class_of(scheduler) for scheduler in engine._schedulers],
        "registered": len(engine._registered),
        "shapes": {},
        "buffer_shapes": {},
        "tied": {},
        "transient": [],
    }
    for index, model in enumerate(engine._models):
        prefix = f"model{index}"
        found["shapes"] |= _under(prefix, engine.backend.param_shapes(model))
        found["buffer_shapes"] |= _under(prefix, {name: list(b.shape) for name, b in model.named_buffers()})
        found["tied"] |= {f"{prefix}.{name}": f"{prefix}.{first}" for name, first in tied_names(model).items()}
        found["transient"] += [f"{prefix}.{name}" for name in transient_names(model)]
    return found


def common_state(engine: Trained) -> dict[str, Any]:
    """Return what all ranks share. All ranks call it: a registered object's state_dict may be a collective."""
    return {
        "step": engine.clock.step,
        "schedulers": [scheduler.state_dict() for scheduler in engine._schedulers],
        # What the engine itself prepared knows whether the batch in hand was trained with.
        "loaders": [
            loader.state_dict(again=True) if isinstance(loader, PreparedLoader) else loader.state_dict()
            for loader in engine._loaders
        ],
        "scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
        "registered objects": [value.state_dict() for value in engine._registered],
        "faces": {name: value.state_dict() for name, value in engine._faces.items()},
        "optimizer groups": [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in engine._optimizers
        ],
    }


def own_state(engine: Trained, random: RandomStates) -> dict[str, Any]:
    """Return what this rank alone has."""
    onebit = [getattr(optimizer, "onebit", None) for optimizer in engine._optimizers]
    rank_states = [getattr(loader, "rank_state_dict", None) for loader in engine._loaders]
    return {
        "random": random.state_dict(),
        "onebit": [held.state_dict() if held is not None else None for held in onebit],
        "loaders": [state() if state is not None else None for state in rank_states],
    }


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(
    engine: Trained,
    input_dir: str,
    group: dist.ProcessGroup | None,
    *,
    optimizers: bool = True,
    strict: bool = True,
    models: frozenset[int] | None = None,
) -> tuple[Manifest, list[str]]:
    """Bring the engine to the state in `input_dir`. Collective; any earlier stage and number of ranks will do.

    Everything is compared, and every checksum of what this rank reads, before anything is changed. Without `optimizers`
    their states and groups stay as they are; `models` (by number) are those whose weights are taken, None for all.
    With `strict` False what either side lacks stays as it is. Returns the manifest, and what was not taken.

    Raises: UserError on all ranks alike. Where it came when some of the state was in place already, the engine trains
    no more until a load has gone well.
    """
    target = Path(input_dir).absolute()
    seen: list[tuple[Checkpoint, dict[str, Any], dict[str, Any] | None, Fit]] = []

    def look() -> None:
        checkpoint = open_checkpoint(target)
        common = _of_any_format(checkpoint.common())
        # Ranks that share a batch go on with the random numbers of one of those that shared it.
        rank = engine.data_index * checkpoint.ranks_of_a_batch
        own = checkpoint.own(rank) if checkpoint.has_rank(rank) else None
        take_in: Any = getattr(engine.backend, "take_in", None)  # other backends step what is frozen as well
        if optimizers and take_in is not None:
            for index, optimizer in enumerate(engine._optimizers):
                take_in(optimizer, _with_states(checkpoint, index))
        found = fit(engine, checkpoint, common, optimizers=optimizers, strict=strict, models=models)
        checkpoint.read(_wanted_before(found))
        seen.append((checkpoint, common, own, found))

    _agreed(look, group, target)
    checkpoint, common, own, found = seen[0]
    with engine.half_loaded(f"{target} was not loaded to its end"):
        items = dict(found.items)
        for index in found.optimizers:
            engine.backend.allocate_states(engine._optimizers[index], found.saved_states(index))
            items |= _under(f"optimizer{index}", engine.backend.optimizer_items(engine._optimizers[index], None))

        def read() -> None:
            tensors = {key: item for key, item in items.items() if isinstance(item, torch.Tensor)}
            lacking = sorted(set(tensors) - set(checkpoint.entries))
            if lacking and strict:
                raise UserError(
                    f"the checkpoint {target} has no optimizer state for some parameters",
                    f"missing: {', '.join(lacking[:8])}{f' and {len(lacking) - 8} more' if len(lacking) > 8 else ''}",
                    "freeze the same parameters as the run that saved it, or load with strict=False",
                )
            checkpoint.read(want(key, item) for key, item in tensors.items() if key in checkpoint.entries)

        _agreed(read, group, target)
        for model in engine._models:
            engine.backend.loaded(model)
        _load_common(engine, common, found)
        _load_own(engine, checkpoint, own, found)
        engine.forget_step()
        if dist.is_initialized():
            engine.wait_for_everyone()
        # Last: whatever was called before may have drawn.
        if own is not None:
            RandomStates.of(own["random"]).give_back()
    return checkpoint.manifest, found.left_out


def _with_states(checkpoint: Checkpoint, index: int) -> set[str]:
    """Return the parameters of which an optimizer had states."""
    prefix = f"optimizer{index}."
    return {key[len(prefix) :].rpartition(".")[0] for key in checkpoint.entries if key.startswith(prefix)}


def _agreed(act: Any, group: dist.ProcessGroup | None, target: Path) -> None:
    try:
        together(act, group)
    except Failed as error:
        raise UserError(
            f"the checkpoint {target} cannot be read", str(error), "see to the disk, and try again"
        ) from None


def _of_any_format(common: dict[str, Any]) -> dict[str, Any]:
    names = {"registered": "registered objects", "groups": "optimizer groups"}  # as format 1 had them
    return {"faces": {}, **{names.get(key, key): value for key, value in common.items()}}


def _wanted_before(found: Fit) -> list[Want]:
    """Return what is compared with its checksums before anything is changed; nothing but numbers is taken yet.

    States lie as weights do. Optimizers make room by their numbers: what differs in its steps cannot be one range.
    """
    wants = [
        dataclasses.replace(wanted, put=None, put_box=None) for wanted in itertools.starmap(want, found.items.items())
    ]
    for index in found.optimizers:
        for name, entry in found.saved_states(index).items():
            if entry.number is not None:
                continue
            param = found.weights.get(name.rpartition(".")[0])
            flat = isinstance(param, FlatShard) and entry.size == torch.Size([param.numel()])
            key = f"optimizer{index}.{name}"
            if flat:
                assert param is not None
                wants.append(dataclasses.replace(want(key, param), put=None, put_box=None))
            else:
                wants.append(Want(key, 0, entry.size.numel(), None if entry.size else entry.take_value))
    return wants


def _load_common(engine: Trained, common: dict[str, Any], found: Fit) -> None:
    engine.clock.step = int(common["step"])
    for kind, objects in (
        ("schedulers", engine._schedulers),
        ("loaders", engine._loaders),
        ("registered objects", engine._registered),
    ):
        if kind not in found.skipped:
            for value, state in zip(objects, common[kind], strict=True):
                value.load_state_dict(state)
    for name, value in engine._faces.items():
        if name in common["faces"]:
            value.load_state_dict(common["faces"][name])
    if found.optimizers and engine.scaler is not None and common["scaler"] is not None:
        engine.scaler.load_state_dict(common["scaler"])
    for index in found.optimizers:
        for group, state in zip(engine._optimizers[index].param_groups, common["optimizer groups"][index], strict=True):
            _load_group(group, state)


def _load_group(group: dict[str, Any], state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if key in ("params", "fused", "foreach"):  # whose they are is this run's matter
            continue
        if isinstance(group.get(key), torch.Tensor):
            group[key].copy_(torch.as_tensor(value))  # schedulers and compiled steps hold the tensor itself
        else:
            group[key] = value


def _same_data_ranks(engine: Trained, checkpoint: Checkpoint) -> bool:
    return int(checkpoint.manifest["world_size"]) == engine.num_data_ranks * checkpoint.ranks_of_a_batch


def _load_own(engine: Trained, checkpoint: Checkpoint, own: dict[str, Any] | None, found: Fit) -> None:
    """Take what this rank had; a rank that was not there before begins anew."""
    for index in found.optimizers:
        onebit = getattr(engine._optimizers[index], "onebit", None)
        if onebit is not None:
            # Error feedback is of no use without the rank's own; but when the variance froze, all ranks know.
            kept = (own if own is not None else checkpoint.own(0)).get("onebit", [])
            onebit.load_state_dict(kept[index] if index < len(kept) else None)
    kept = own.get("loaders") if own is not None else None
    if kept and "loaders" not in found.skipped and _same_data_ranks(engine, checkpoint):
        for loader, state in zip(engine._loaders, kept, strict=True):
            if state is not None:
                loader.load_rank_state_dict(state)
