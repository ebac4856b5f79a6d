"""Trainings of mixtures whose experts are over ranks that also cut the model, or are a stage of a pipeline."""

from __future__ import annotations

from typing import Any

import torch
from tests.dist.parallel import pipelines, trainings
from tests.dist.parallel.experts import Mixture, _mixtral, even_loss, plain_loss
from tests.dist.parallel.test_tensor_states import _states
from tests.dist.parallel.trainings import steps, trained

import distui

Layout = tuple[dict[str, int | str], int]
"""Axes and how they are run, as `strategy` has them, and the ZeRO stage."""


trainings.MODELS |= {"mixtral-deep": lambda: _mixtral(num_hidden_layers=4)}


def prepared(name: str, layout: Layout, **sections: Any) -> tuple[distui.Engine, Any, Any, Any]:
    """Return engine, model, optimizer and loader."""
    (axes, stage), kept = layout, dict(sections)
    strategy = {key: value for key, value in axes.items() if key != "pipeline_parallel"}
    return pipelines.prepared(name, int(axes.get("pipeline_parallel", 1)), stage, strategy=strategy, **kept)


def several(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Train each (name, layout), and what sections a case has beside."""
    torch.set_num_threads(1)
    return [_train(*case) for case in cases]


def _train(name: str, layout: Layout, sections: dict[str, Any] | None = None) -> dict[str, Any]:
    parts = prepared(name, layout, **(sections or {}))
    held = sum(param.numel() for name, param in parts[1].named_parameters() if ".mlp.experts." in name)
    return trained(name, *parts, even_loss) | {"held": held}


def saved(name: str, layout: Layout, folder: str) -> dict[str, Any]:
    """Train two steps and save; return the weights, and what the steps after it give."""
    engine, model, optimizer, loader = prepared(name, layout)
    batches = list(loader)
    steps(name, engine, model, optimizer, batches[:2], even_loss)
    engine.save_state(f"{folder}/state")
    engine.save_model(model, f"{folder}/model")
    weights = engine.get_state_dict(model)
    found = steps(name, engine, model, optimizer, batches[2:], even_loss)
    engine.free_memory()
    return {**found, "saved": weights, "weights": {}}


def resumed(name: str, layout: Layout, folder: str) -> dict[str, Any]:
    """Load what `saved` wrote into another layout, and go on; `states` are all of it, where a rank may ask for them."""
    engine, model, optimizer, loader = prepared(name, layout)
    batches = list(loader)
    engine.load_state(f"{folder}/state")
    weights = engine.get_state_dict(model)
    states = _states(engine, model, optimizer) if "pipeline_parallel" not in layout[0] else None
    found = steps(name, engine, model, optimizer, batches[2:], even_loss)
    engine.free_memory()
    return {**found, "saved": weights, "states": states, "weights": {}}


def mixture(layout: Layout) -> dict[str, Any]:
    """Train distui.MoE, of which no table says how the rest is cut; return the loads too."""
    (axes, stage), names = layout, dict[str, Any]()
    engine = distui.Engine(strategy={"zero_stage": stage, **axes})
    torch.manual_seed(engine.process_index)
    model: Any = Mixture()
    if "tensor_parallel" in axes:
        names = {"plan": {"embedding": "embedding_rowwise", "head": "colwise_gather_output"}}
    optimizer: Any = trainings.optimizer_of(model)
    loader: Any = torch.utils.data.DataLoader(trainings.samples(), batch_size=4 // engine.num_data_ranks)  # type: ignore[arg-type]
    model, optimizer, loader = engine.prepare(model, optimizer, loader, **names)
    found = steps("mixture", engine, model, optimizer, loader, plain_loss)
    found["weights"] = engine.get_state_dict(model)
    found["loads"] = [layer.moe.load.tolist() for layer in model.layers]
    engine.free_memory()
    return found


def uneven(layout: Layout | None) -> dict[str, Any]:
    """Train a batch of which one data rank has three rows and the other one: fewer than there are micro-batches."""
    engine, model, optimizer, _ = prepared("mixtral", layout or ({}, 0))
    ids_BT = torch.stack(trainings.samples()[:4])[:, :8]
    own = ids_BT if layout is None else ids_BT[:3] if engine.data_index == 0 else ids_BT[3:]
    # Of 28 labels in all, over two ranks whose gradients are averaged.
    loss = model(input_ids=own, labels=own, num_items_in_batch=None if layout is None else torch.tensor(14.0)).loss
    engine.backward(loss)
    norm = engine.clip_grad_norm_(model.parameters(), 0.5)
    assert norm is not None
    optimizer.step()
    found = {"losses": [], "norms": [float(norm)], "weights": engine.get_state_dict(model)}
    engine.free_memory()
    return found
