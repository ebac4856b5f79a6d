"""Trainings in which groups of ranks hold a copy of the states each (`strategy.shard_size`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

import distui
from tests.dist.parallel import experts
from tests.dist.parallel.test_tensor_states import _states
from tests.dist.parallel.trainings import MAX_NORM, loss_of, prepared, steps, trained

Case = tuple[str, int, dict[str, Any]]
"""A model, the stage, and settings."""


def train(name: str, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Return losses, norms and weights of five clipped steps."""
    strategy = dict(sections.get("strategy", {}))
    tensor = strategy.pop("tensor", 1)
    return trained(name, *prepared(name, tensor, stage, **sections | {"strategy": strategy}), experts.even_loss)


def twice(name: str, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """The same, of two backward passes a step that both reduce."""
    engine, model, optimizer, loader = prepared(name, 1, stage, **sections)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for ids_BT in loader:
        for part in (ids_BT[:, :5], ids_BT[:, 3:]):
            loss = loss_of(name, model, part)
            engine.backward(loss)
        found["losses"].append(float(engine.reduce(loss.detach(), "mean")))
        norm = engine.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert norm is not None
        found["norms"].append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    return found | {"weights": engine.get_state_dict(model)}


def matrices(name: str, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """The same, with an optimizer that sees whole matrices."""
    engine, model, _, loader = prepared(name, 1, stage, **sections)
    engine.free_memory()
    engine = distui.Engine(strategy={"zero_stage": stage, **sections.get("strategy", {})})
    model = nn.Sequential(nn.Linear(9, 12, bias=False), nn.Tanh(), nn.Linear(12, 9, bias=False))
    torch.manual_seed(3)
    for param in model.parameters():
        nn.init.normal_(param)
    model, optimizer = engine.prepare(model, torch.optim.Adafactor(model.parameters(), lr=1e-2))
    found: dict[str, Any] = {"losses": [], "norms": []}
    for ids_BT in loader:
        loss = model(ids_BT.float() / 37).square().mean()
        engine.backward(loss)
        found["losses"].append(float(engine.reduce(loss.detach(), "mean")))
        optimizer.step()
        optimizer.zero_grad()
    return found | {"weights": engine.get_state_dict(model)}


def several(cases: list[tuple[str, str, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    ways = {"train": train, "twice": twice, "matrices": matrices}
    return [ways[way](name, stage, sections) for way, name, stage, sections in cases]


def losses(cases: list[Case]) -> list[dict[str, Any]]:
    return [{key: value for key, value in train(*case).items() if key != "weights"} for case in cases]


def on_nodes(ranks_per_node: int, case: Case) -> dict[str, Any]:
    """Train as if so many ranks were on a node each."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    return losses([case])[0]


def save(name: str, stage: int, sections: dict[str, Any], folder: str) -> dict[str, Any]:
    engine, model, optimizer, loader = prepared(name, 1, stage, **sections)
    steps(name, engine, model, optimizer, loader)
    engine.save_state(folder)
    found = _states(engine, model, optimizer)
    engine.free_memory()
    return found


def load(name: str, stage: int, sections: dict[str, Any], folder: str, again: str = "") -> dict[str, Any]:
    """Return the states after loading; what was loaded is saved to `again`."""
    engine, model, optimizer, _ = prepared(name, 1, stage, **sections)
    engine.load_state(folder)
    found = _states(engine, model, optimizer)
    if again:
        engine.save_state(again)
    engine.free_memory()
    return found


def held(stage: int, shard_size: int) -> dict[str, Any]:
    """Return bytes by category and those sent, and whether the whole state of rank 0 alone is here."""
    engine, model, optimizer, loader = prepared("llama", 1, stage, strategy={"shard_size": shard_size})
    steps("llama", engine, model, optimizer, loader)
    sharded = engine.backend.sharded(model)  # type: ignore[attr-defined]
    found = {
        "memory": {key: value for key, value in sharded.memory_by_category().items() if key != "buffers"},
        "shards": [unit.layout.shard_numel for unit in sharded.units],
        "sent": {transport.name: transport.sent_bytes for transport in sharded.transports},
        "rank 0": len(sharded.full_state_dict(only_rank_0=True)),
        "mesh": tuple(engine.mesh.mesh.shape),
        "data": (engine.num_data_ranks, engine.data_index),
    }
    engine.free_memory()
    return found


def sent(accumulation: int) -> dict[str, int]:
    """Return the bytes of gradients that one step at stage 2 sends to those who share the states, and to the copies."""
    batch = {"accumulation": accumulation}
    engine, model, optimizer, loader = prepared("llama", 1, 2, strategy={"shard_size": 2}, batch=batch)
    sharded = engine.backend.sharded(model)  # type: ignore[attr-defined]
    for _, ids_BT in zip(range(accumulation), loader, strict=False):
        with engine.accumulate(model):
            engine.backward(loss_of("llama", model, ids_BT))
            near, across = sharded.transport.sent_bytes, sharded.replicas.across.sent_bytes
            optimizer.step()
    engine.free_memory()
    return {"near": near, "across": across}


def overflowing(stage: int) -> list[bool]:
    """Let the gradient of one rank overflow in fp16; return of each step whether it was skipped."""
    precision = {"dtype": "fp16", "initial_loss_scale": 1024.0}
    engine, model, optimizer, loader = prepared("llama", 1, stage, strategy={"shard_size": 2}, precision=precision)
    skipped: list[bool] = []
    for ids_BT in loader:
        loss = loss_of("llama", model, ids_BT)
        factor = 1e30 if not skipped and engine.process_index == 3 else 1.0
        engine.backward(loss * factor)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(engine.optimizer_step_was_skipped)
    engine.free_memory()
    return skipped
