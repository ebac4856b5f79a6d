"""Trainings whose sequences are cut over context-parallel ranks, with padding and ignored labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import distui
from distui.core.errors import UserError
from distui.core.parallel import ring
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


def _engine(context: int, tensor: int, stage: int, method: str = "auto", **sections: Any) -> distui.Engine:
    sizes = {"context_parallel": context, "tensor_parallel": tensor, "zero_stage": stage, "context_method": method}
    return distui.Engine(strategy=sizes, **sections)


def _train(name: str, context: int, tensor: int, stage: int, masked: bool, method: str = "auto") -> dict[str, Any]:
    engine = _engine(context, tensor, stage, method)
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
    run_ranks: Callable[..., Any],
    name: str,
    context: int,
    tensor: int,
    world: int,
    stage: int,
    masked: bool,
    method: str = "auto",
) -> None:
    alone = _alone(name, masked)
    seen = _batches()[1]["attention_mask"].bool()
    for found in run_ranks(_train, world, name, context, tensor, stage, masked, method):
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


RINGS = [
    ("llama", 2, 1, 2, 0, True, "ring"),
    ("llama-tied", 3, 1, 3, 3, True, "auto"),  # four heads over three ranks
    ("gpt2", 2, 1, 4, 1, False, "ring"),
    ("qwen3", 2, 2, 4, 2, True, "ring"),
]


@pytest.mark.parametrize("case", RINGS)
def test_cut_sequences_train_as_whole_ones_in_a_ring(run_ranks: Callable[..., Any], case: tuple[Any, ...]) -> None:
    _check(run_ranks, *case)


def _ring_alone(num_key_heads: int) -> float:
    """Compare a ring's attention and gradients with torch's, tile by tile; return the largest difference."""
    ring._TILE_NUMEL = 60
    num_ranks, index = dist.get_world_size(), dist.get_rank()
    length, worst = 4 * num_ranks, 0.0
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 5, generator=generator).requires_grad_() for h in (6, *[num_key_heads] * 2))
    grad = torch.randn(2, 6, length, 5, generator=generator)
    behind = torch.arange(length) >= length - 3
    for padding in (None, torch.stack([behind, ~behind]), torch.stack([behind.flip(0), behind])):
        sees = torch.ones(length, length).tril().bool().expand(2, 1, length, length)
        sees = sees if padding is None else sees & ~padding[:, None, None]
        groups = 6 // num_key_heads
        whole = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), sees
        )
        whole = torch.where(sees.any(-1, keepdim=True), whole, 0.0)
        expected = (whole, *torch.autograd.grad(whole, (q, k, v), grad))
        own = ring.zigzag(length, num_ranks)[index]
        parts = tuple(x[:, :, own].detach().requires_grad_() for x in (q, k, v))
        assert dist.group.WORLD is not None
        found = ring.ring_attention(parts[0], parts[1], parts[2], padding, 5**-0.5, dist.group.WORLD)
        for mine, other in zip((found, *torch.autograd.grad(found, parts, grad[:, :, own])), expected, strict=True):
            worst = max(worst, float((mine - other[:, :, own]).detach().abs().max()))
    return worst


@pytest.mark.parametrize(("num_ranks", "num_key_heads"), [(2, 6), (3, 2), (4, 1)])
def test_attention_in_a_ring_is_that_of_the_whole(
    run_ranks: Callable[..., Any], num_ranks: int, num_key_heads: int
) -> None:
    assert max(run_ranks(_ring_alone, num_ranks, num_key_heads)) < 1e-5


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


def _by_hand(context: int, recomputed: str, method: str = "auto") -> dict[str, Any]:
    """Take the loss of the logits, which a script computes itself; all ranks of a batch have the same."""
    engine = _engine(context, 1, 3 if context > 1 else 0, method, activation_checkpointing={"mode": recomputed})
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


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_loss_of_the_scripts_own_sees_whole_logits(run_ranks: Callable[..., Any], method: str) -> None:
    alone = _by_hand(1, "none")
    for found in run_ranks(_by_hand, 2, 2, "full", method):
        assert difference(found, alone) < 1e-5


def _told(what: str) -> str:
    try:
        engine = _engine(2, 1, 0, "ring" if "ring" in what else "auto")
        name = what if what in ("opt", "encoder") else "llama"
        model: Any = build(name)
        if what == "dropping in a ring":
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.25
        model = engine.prepare(model)
        ids = torch.ones(2, {"odd": 7, "odd in a ring": 6}.get(what, 8), dtype=torch.long)
        more: dict[str, Any] = {
            "hidden": {"output_hidden_states": True},
            "cache": {"use_cache": True},
            "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
            "mask": {"attention_mask": torch.ones(2, 1, 8, 8)},
            "batches": {"labels": ids + engine.process_index},
        }
        if what == "part":
            model.model(input_ids=ids)
        model(input_ids=ids, **more.get(what, {}))
    except UserError as error:
        return f"{error.what}: {error.why}: {error.fix}"
    return "nothing was said"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("odd", "sequences of 7 tokens over context_parallel=2 ranks: 7 = 3 x 2 + 1"),
        (
            "odd in a ring",
            "sequences of 6 tokens over context_parallel=2 ranks: 6 = 1 x 4 + 2; every rank takes two pieces of as many "
            "tokens in a ring: pad or cut them to 4 or 8 tokens",
        ),
        (
            "dropping in a ring",
            "attention of LlamaAttention over context_parallel=2 ranks: dropout=0.25 is set; in a ring it is causal",
        ),
        ("hidden", "output_hidden_states=True under context_parallel=2"),
        ("part", "a part of LlamaForCausalLM was called, and not the model"),
        ("cache", "use_cache=True under context_parallel=2"),
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
