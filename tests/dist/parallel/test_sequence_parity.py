"""Trainings whose sequences are cut over context-parallel ranks, with padding and ignored labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distui
from distui.core.errors import UserError
from tests.dist.parallel.trainings import MAX_NORM, ROWS, STEPS, VOCAB, build, difference, optimizer_of

LENGTH = 12


def _batches() -> list[dict[str, torch.Tensor]]:
    """Return samples of which some are padded behind, and of some labels the first or the last part is ignored."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(ROWS * STEPS):
        ids = torch.randint(1, VOCAB, (LENGTH,), generator=generator)
        mask, labels = torch.ones(LENGTH, dtype=torch.long), ids.clone()
        if number % 3 == 1:
            mask[LENGTH - 4 - number % 5 :] = 0
            labels[mask == 0] = -100
        if number % 4 == 2:
            labels[: LENGTH // 2 + 1] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def _engine(context: int, tensor: int, stage: int, **sections: Any) -> distui.Engine:
    sizes = {"context_parallel": context, "tensor_parallel": tensor, "zero_stage": stage}
    return distui.Engine(strategy=sizes, **sections)


def _train(name: str, context: int, tensor: int, stage: int, masked: bool, **sections: Any) -> dict[str, Any]:
    engine = _engine(context, tensor, stage, **sections)
    model = build(name, engine.process_index)
    loader: Any = torch.utils.data.DataLoader(
        _batches(),  # type: ignore[arg-type]
        batch_size=ROWS // engine.num_data_ranks,
    )
    model, optimizer, loader = engine.prepare(model, optimizer_of(model), loader)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for batch in loader:
        batch = batch if masked else {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
        with engine.accumulate(model):
            # Per sample, so that data ranks with other numbers of valid tokens have a mean of one process's.
            rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["labels"]))]
            loss = torch.stack([model(**row).loss for row in rows]).mean()
            engine.backward(loss)
            norm = engine.clip_grad_norm_(model.parameters(), MAX_NORM)
            assert norm is not None
            found["norms"].append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
        found["losses"].append(float(engine.reduce(loss.detach(), "mean")))
    model.eval()
    with torch.no_grad():
        output = model(**{key: value[None] for key, value in _batches()[1].items()})
    found["logits"], found["evaluated"] = output.logits, float(output.loss)
    found["weights"] = engine.get_state_dict(model)
    engine.free_memory()
    return found


@functools.cache
def _alone(name: str, masked: bool) -> dict[str, Any]:
    return _train(name, 1, 1, 0, masked)


def _check(
    run_ranks: Callable[..., Any], name: str, context: int, tensor: int, world: int, stage: int, masked: bool
) -> None:
    alone = _alone(name, masked)
    seen = _batches()[1]["attention_mask"].bool()
    for found in run_ranks(_train, world, name, context, tensor, stage, masked):
        assert difference(found, alone) < 1e-5
        assert found["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-5)
        torch.testing.assert_close(found["logits"][0, seen], alone["logits"][0, seen], rtol=1e-4, atol=1e-4)


PAIRS = [
    ("llama", 2, 1, 2, 0, True),
    ("llama-tied", 2, 1, 4, 3, True),
    ("gpt2", 2, 1, 2, 2, False),
    ("qwen3", 2, 2, 4, 1, True),
]


@pytest.mark.parametrize(("name", "context", "tensor", "world", "stage", "masked"), PAIRS)
def test_cut_sequences_train_as_whole_ones(
    run_ranks: Callable[..., Any], name: str, context: int, tensor: int, world: int, stage: int, masked: bool
) -> None:
    _check(run_ranks, name, context, tensor, world, stage, masked)


GRID = [
    (name, context, tensor, world, stage, masked)
    for name in ("llama", "llama-tied", "gpt2", "qwen3", "qwen3-moe")
    for context, tensor, world in ((2, 1, 2), (2, 1, 4), (4, 1, 4), (2, 2, 4))
    for stage in range(4)
    for masked in (True, False)
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "context", "tensor", "world", "stage", "masked"), GRID)
def test_cut_sequences_train_as_whole_ones_on_the_whole_grid(
    run_ranks: Callable[..., Any], name: str, context: int, tensor: int, world: int, stage: int, masked: bool
) -> None:
    _check(run_ranks, name, context, tensor, world, stage, masked)


def _by_hand(context: int, recomputed: str) -> dict[str, Any]:
    """Take the loss of the logits, which a script computes itself; all ranks of a batch have the same."""
    engine = _engine(context, 1, 3 if context > 1 else 0, activation_checkpointing={"mode": recomputed})
    model = build("llama", engine.process_index)
    model, optimizer = engine.prepare(model, optimizer_of(model))
    found: dict[str, Any] = {"losses": [], "norms": []}
    for batch in (torch.stack([sample["input_ids"] for sample in _batches()[n : n + 3]]) for n in (0, 3)):
        logits = model(input_ids=batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        engine.backward(loss)
        norm = engine.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert norm is not None
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(loss.detach()))
        found["norms"].append(float(norm))
    found["weights"] = engine.get_state_dict(model)
    engine.free_memory()
    return found


def test_a_loss_of_the_scripts_own_sees_whole_logits(run_ranks: Callable[..., Any]) -> None:
    alone = _by_hand(1, "none")
    for found in run_ranks(_by_hand, 2, 2, "full"):
        assert difference(found, alone) < 1e-5


def _told(what: str) -> str:
    try:
        engine = _engine(2, 1, 0)
        name = what if what in ("opt", "encoder") else "llama"
        model = engine.prepare(build(name))
        ids = torch.ones(2, 7 if what == "odd" else 8, dtype=torch.long)
        more: dict[str, Any] = {
            "hidden": {"output_hidden_states": True},
            "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
            "mask": {"attention_mask": torch.ones(2, 1, 8, 8)},
            "batches": {"labels": ids + engine.process_index},
        }
        model(input_ids=ids, **more.get(what, {}))
    except UserError as error:
        return f"{error.what}: {error.why}: {error.fix}"
    return "nothing was said"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("odd", "sequences of 7 tokens over context_parallel=2 ranks: 7 = 3 x 2 + 1"),
        ("hidden", "output_hidden_states=True under context_parallel=2"),
        ("packed", "position_ids that are not 0, 1, 2, ... under context parallelism"),
        ("mask", "an attention_mask of [2, 1, 8, 8] under context parallelism"),
        ("batches", "context-parallel ranks were given different batches"),
        ("opt", "context parallelism is not known to be right for OPTForCausalLM: it is no causal model with rotary"),
        ("encoder", "context parallelism is not known to be right for Encoder: it is none of transformers' models"),
    ],
)
def test_what_a_piece_cannot_tell_is_refused(run_ranks: Callable[..., Any], what: str, said: str) -> None:
    for found in run_ranks(_told, 2, what):
        assert found.startswith(said), found


def _dropping() -> tuple[float, float]:
    """Return whether dropout differs over the pieces, and whether the script's own numbers do not."""
    engine = _engine(2, 1, 0)
    model = build("llama")
    seen: list[float] = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(float(torch.rand(()))))  # type: ignore[union-attr]
    torch.manual_seed(7)
    model = engine.prepare(model)
    model(input_ids=torch.ones(2, 8, dtype=torch.long))
    return seen[0], float(torch.rand(()))


def test_each_piece_draws_its_own_random_numbers(run_ranks: Callable[..., Any]) -> None:
    first, second = run_ranks(_dropping, 2)
    assert first[0] != second[0] and first[1] == second[1]
