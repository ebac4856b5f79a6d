"""Losses of a part of the tokens or of the vocabulary at a time, on ranks."""

from __future__ import annotations

from typing import Any

import torch

import distui
from tests.dist.parallel.experts import even_loss
from tests.dist.parallel.trainings import VOCAB, build, optimizer_of, prepared, trained

Given = dict[str, Any]


def batch(kind: str) -> Given:
    """Return two rows, of which labels are ignored as `kind` says."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCAB, (2, 9), generator=generator)
    labels = ids.clone()
    if kind == "ignored":
        labels[0, :6] = -100
    elif kind == "none is valid":
        labels[:] = -100
    given: Given = {"input_ids": ids, "labels": labels}
    if kind == "counted":
        given["num_items_in_batch"] = torch.tensor(11)
    elif kind == "shifted":
        given["shift_labels"] = ids.roll(-1, 1)
    return given


KINDS = ("plain", "ignored", "none is valid", "counted", "shifted")


def steps(name: str, tensor: int, stage: int, tile: int, **sections: Any) -> list[tuple[float, float, Any]]:
    """Return of each kind of labels the loss, the norm of the gradients, and the logits that the output has."""
    strategy = {"tensor_parallel": tensor, "zero_stage": stage, **sections.pop("strategy", {})}
    recomputed = {"loss_tile": tile, "mlp_tile": tile, **sections.pop("activation_checkpointing", {})}
    engine = distui.Engine(strategy=strategy, activation_checkpointing=recomputed, **sections)
    model = build(name, engine.process_index)
    model, optimizer = engine.prepare(model, optimizer_of(model))
    found = []
    for kind in KINDS:
        output = model(**batch(kind))
        engine.backward(output.loss)
        norm = engine.clip_grad_norm_(model.parameters(), 1e9)
        assert norm is not None
        optimizer.zero_grad()
        found.append((float(output.loss.detach()), float(norm), output.logits))
    model.eval()
    with torch.no_grad():
        output = model(**batch("plain"))
    found.append((float(output.loss), 0.0, list(output.logits.shape)))
    engine.free_memory()
    return found


def gathered(name: str) -> list[tuple[float, float, Any]]:
    """Return the same of two ranks that cut the vocabulary, and give whole logits beside the loss."""
    return steps(name, 2, 1, 0, strategy={"gather_logits": True})


def several(cases: list[tuple[Any, ...]]) -> list[list[tuple[float, float, Any]]]:
    return [steps(*case) for case in cases]


def train(name: str, tensor: int, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    return trained(name, *prepared(name, tensor, stage, **sections), even_loss)


def wrong(tensor: int) -> str:
    """Give a label that is no token."""
    engine = distui.Engine(strategy={"tensor_parallel": tensor})
    model: Any = build("llama")
    model, _ = engine.prepare(model, optimizer_of(model))
    ids = torch.ones(1, 4, dtype=torch.long)
    try:
        model(input_ids=ids, labels=ids * VOCAB)
    except (IndexError, RuntimeError) as error:
        return str(error)
    finally:
        engine.free_memory()
    return "nothing was said"
