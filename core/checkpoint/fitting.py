"""Whether a checkpoint fits an engine: names, shapes, formats and classes, all of it before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distui.core.checkpoint.layout import Entry
from distui.core.checkpoint.names import class_of, params_of_groups, transient_names
from distui.core.checkpoint.reading import Checkpoint
from distui.core.checkpoint.trained import Trained
from distui.core.errors import UserError

SHOWN = 12
"""Names that an error lists of each kind."""
_OF_VERSIONS = {"foreach", "maximize", "capturable", "differentiable", "fused", "amsgrad", "decoupled_weight_decay"}
"""Hyper-parameters that torch's optimizers got in the course of time."""


@dataclass(slots=True)
class Fit:
    """What is taken out of a checkpoint."""

    entries: dict[str, Entry]
    items: dict[str, torch.Tensor] = field(default_factory=dict)
    """What of this rank's models is filled, by key."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """All of this rank's weights, by the name in their model."""
    optimizers: list[int] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """Kinds of objects whose states are left as they are."""
    left_out: list[str] = field(default_factory=list)
    """What is not taken, in words."""

    def saved_states(self, index: int) -> dict[str, Entry]:
        """Return the states of an optimizer, by `<parameter>.<state>`."""
        prefix = f"optimizer{index}."
        return {key[len(prefix) :]: entry for key, entry in self.entries.items() if key.startswith(prefix)}


def fit(
    engine: Trained,
    checkpoint: Checkpoint,
    common: Mapping[str, Any],
    *,
    optimizers: bool,
    strict: bool,
    models: frozenset[int] | None,
) -> Fit:
    """Compare, and return what is to be taken.

    Raises: UserError that lists everything that does not fit. With `strict` False names may be missing on either side,
    formats may differ, and of objects that do not match the states stay; shapes must be equal all the same.
    """
    found = Fit(checkpoint.entries)
    problems: list[str] = []
    lenient: list[str] = []
    _fit_models(engine, checkpoint, models, found, problems, lenient)
    of_model = bool(problems or lenient)
    if optimizers:
        _fit_optimizers(engine, checkpoint, common, found, lenient)
    for kind, mine in (
        ("schedulers", engine._schedulers),
        ("loaders", engine._loaders),
        ("registered objects", engine._registered),
    ):
        if len(mine) != len(common[kind]):
            lenient.append(
                f"it has {len(common[kind])} {kind}, the engine {len(mine)}: they are matched by the order in which "
                "they were prepared or registered"
            )
            found.skipped.add(kind)
    _fit_schedulers(engine, checkpoint, found, lenient)
    if problems or (strict and lenient):
        what = "is of another model" if of_model else "does not fit this run"
        fix = "build and prepare the same objects as the script that saved it"
        raise UserError(
            f"the checkpoint {checkpoint.folder} {what}",
            "; ".join([*problems, *lenient]),
            fix if problems else f"{fix}, or load what fits with strict=False",
        )
    found.left_out = lenient
    return found


def listed(names: list[str]) -> str:
    """Return the first names in order, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def _fit_models(
    engine: Trained,
    checkpoint: Checkpoint,
    models: frozenset[int] | None,
    found: Fit,
    problems: list[str],
    lenient: list[str],
) -> None:
    manifest, entries = checkpoint.manifest, checkpoint.entries
    transient = set(manifest.get("transient", ()))
    saved_shapes: dict[str, list[int]] = {**manifest["shapes"], **manifest["buffer_shapes"]}
    # Another precision or backend keeps some tensors in another format, and that is meant.
    same_formats = (manifest["dtype"], manifest["backend"]) == (engine.config.precision.dtype, engine.backend.name)
    mine: set[str] = set()
    missing, wrong, formats = [], [], []
    for index, model in enumerate(engine._models):
        transient |= {f"model{index}.{name}" for name in transient_names(model)}
        shapes = engine.backend.param_shapes(model) | {name: list(b.shape) for name, b in model.named_buffers()}
        for name, item in engine.backend.model_items(model, None).items():
            key = f"model{index}.{name}"
            found.weights.setdefault(name, item)
            mine.add(key)
            if models is not None and index not in models:
                continue
            entry, shape = entries.get(key), shapes.get(name, [*item.shape])
            fits = entry is not None and saved_shapes.get(key) == shape and entry.size.numel() == item.numel()
            if key in transient and not fits:  # a table that grew with the longest input, say: torch keeps none either
                continue
            if entry is None or key not in saved_shapes:
                missing.append(key)
            elif not fits:
                wrong.append(f"{key} is {_shape(saved_shapes[key])} in it and {_shape(shape)} here")
            else:
                found.items[key] = item
                if entry.dtype != item.dtype and (same_formats or not _alike(entry.dtype, item.dtype)):
                    formats.append(f"{key} is {_name(entry.dtype)} in it and {_name(item.dtype)} here")
    extra = [key for key in entries if key.startswith("model") and key not in mine and key not in transient]
    if missing:
        lenient.append(f"it has nothing for {len(missing)} of {len(mine)} tensors: {listed(missing)}")
    if extra:
        lenient.append(f"it has {len(extra)} tensors that are not in the model: {listed(extra)}")
    if wrong:
        problems.append(f"shapes differ: {listed(wrong)}")
    if formats:
        lenient.append(f"formats differ: {listed(formats)}")


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alike(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point == other.is_floating_point and one.is_complex == other.is_complex


def _fit_optimizers(
    engine: Trained, checkpoint: Checkpoint, common: Mapping[str, Any], found: Fit, lenient: list[str]
) -> None:
    saved, groups = checkpoint.manifest.get("optimizers"), common["optimizer groups"]
    if len(groups) != len(engine._optimizers):
        lenient.append(f"it has {len(groups)} optimizers, the engine {len(engine._optimizers)}")
        return
    for index, optimizer in enumerate(engine._optimizers):
        problems = []
        own, own_params = optimizer.param_groups, params_of_groups(optimizer)
        if saved is not None and saved[index]["class"] != class_of(optimizer):
            problems.append(f"optimizer {index} is {saved[index]['class']} in it and {class_of(optimizer)} here")
        elif len(groups[index]) != len(own):
            problems.append(f"optimizer {index} has {len(groups[index])} groups in it and {len(own)} here")
        elif saved is not None and own_params is not None and saved[index]["params"] not in (None, own_params):
            counts = f"{saved[index]['params']} parameters in it and {own_params} here"
            problems.append(f"the groups of optimizer {index} have {counts}")
        elif own and (lacking := sorted(set(optimizer.defaults) - _OF_VERSIONS - set(groups[index][0]))):
            problems.append(f"optimizer {index} is another one in it: its groups have no {', '.join(lacking)}")
        names = {name.rpartition(".")[0] for name in found.saved_states(index)}
        if unknown := sorted(names - set(found.weights)):
            problems.append(f"it has states of optimizer {index} for what is not in the model: {listed(unknown)}")
        lenient += problems
        if not problems:
            found.optimizers.append(index)


def _fit_schedulers(engine: Trained, checkpoint: Checkpoint, found: Fit, lenient: list[str]) -> None:
    saved = checkpoint.manifest.get("schedulers")
    if saved is None or "schedulers" in found.skipped:
        return
    for index, (name, scheduler) in enumerate(zip(saved, engine._schedulers, strict=True)):
        if name != class_of(scheduler):
            lenient.append(f"scheduler {index} is {name} in it and {class_of(scheduler)} here")
            found.skipped.add("schedulers")
