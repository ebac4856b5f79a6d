"""States under tensor parallelism: what one layout saves another loads, bit for bit; whole gradients, files."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import distui
from distui.core.checkpoint.weights import read_weights
from distui.core.errors import UserError
from tests.dist.parallel.trainings import build, loss_of, prepared, samples, steps

Layout = tuple[int, int]
"""Tensor-parallel ranks, and the ZeRO stage."""


def _states(engine: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """Return whole weights and optimizer states by name. Collective."""
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    params = [param for _, param in model.named_parameters() if param.requires_grad]
    order = [param for dims in (True, False) for param in params if (param.dim() > 1) is dims]
    by_number = optimizer.state_dict()["state"]
    found = {f"weights.{name}": value for name, value in engine.get_state_dict(model).items()}
    for name, param in zip(names, params, strict=True):
        number = next(index for index, other in enumerate(order) if other is param)
        found |= {f"{name}.{key}": torch.as_tensor(value) for key, value in by_number.get(number, {}).items()}
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def _save(name: str, layout: Layout, folder: str, **sections: Any) -> dict[str, Any]:
    engine, model, optimizer, loader = prepared(name, *layout, **sections)
    steps(name, engine, model, optimizer, loader)
    engine.save_state(folder)
    found = _states(engine, model, optimizer)
    engine.save_model(model, f"{folder}-model")
    engine.free_memory()
    return found


def _load(name: str, layout: Layout, folder: str, again: str = "", **sections: Any) -> dict[str, Any]:
    """Return the states after loading, and after a round through the optimizer's and the model's own state dicts."""
    engine, model, optimizer, loader = prepared(name, *layout, **sections)
    engine.load_state(folder)
    found = _states(engine, model, optimizer)
    whole, states = engine.get_state_dict(model), copy.deepcopy(optimizer.state_dict())  # views, as in plain torch
    steps(name, engine, model, optimizer, loader)
    engine.load_state_dict(model, whole)
    optimizer.load_state_dict(states)
    round_trip = _states(engine, model, optimizer)
    if again:
        engine.save_state(again)
    engine.free_memory()
    assert found.keys() == round_trip.keys()
    assert all(torch.equal(found[key], round_trip[key]) for key in found)
    return found


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


WAYS = [
    ("awkward", 2, (2, 0), [(1, (1, 0)), (4, (2, 3))]),
    ("llama-tied", 4, (2, 3), [(2, (2, 1)), (4, (4, 2)), (1, (1, 0))]),
]


@pytest.mark.parametrize(("name", "world", "layout", "others"), WAYS)
def test_a_checkpoint_is_loaded_by_other_layouts_bit_for_bit(
    run_ranks: Callable[..., Any],
    tmp_path: Path,
    name: str,
    world: int,
    layout: Layout,
    others: list[tuple[int, Layout]],
) -> None:
    folder = tmp_path / "saved"
    saved = run_ranks(_save, world, name, layout, str(folder))
    assert all(_equal(found, saved[0]) for found in saved[1:])
    source = folder
    for number, (ranks, other) in enumerate(others):
        target = tmp_path / f"again{number}"
        for found in run_ranks(_load, ranks, name, other, str(source), str(target)):
            assert _equal(found, saved[0])
        source = target if number == 0 else source  # what was loaded and saved anew is as good
    whole = {key.removeprefix("weights."): value for key, value in saved[0].items() if key.startswith("weights.")}
    consolidated = read_weights(folder, tied=True)["model0"]
    assert consolidated.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in consolidated.items())
    written = load_file(tmp_path / "saved-model" / "model.safetensors")
    assert written.keys() == read_weights(folder, tied=False)["model0"].keys()
    assert all(torch.equal(value, whole[key]) for key, value in written.items())


GRID = [(tensor, world, stage) for tensor, world in ((2, 2), (2, 4), (4, 4), (1, 2)) for stage in (0, 1, 2, 3)]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe", "encoder"])
@pytest.mark.parametrize("number", range(len(GRID)))
def test_every_layout_is_loaded_by_others(
    run_ranks: Callable[..., Any], tmp_path: Path, name: str, number: int
) -> None:
    tensor, world, stage = GRID[number]
    folder = str(tmp_path / "saved")
    saved = run_ranks(_save, world, name, (tensor, stage), folder)[0]
    for step in (1, 6, 11):  # so that over all of them every kind meets every other
        tensor, world, stage = GRID[(number + step) % len(GRID)]
        assert _equal(run_ranks(_load, world, name, (tensor, stage), folder)[0], saved), (tensor, world, stage)


def _features(tmp: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine, model, optimizer, loader = prepared("awkward", 2, 1)
    batch = next(iter(loader))
    engine.backward(loss_of("awkward", model, batch))
    with engine.gradients(model) as gradients:
        found["gradients"] = {name: grad.clone() for name, grad in gradients.items()}
        gradients["blocks.0.qkv.weight"].mul_(2.0)
        gradients["norm.bias"] = torch.zeros_like(gradients["norm.bias"])
    with engine.gradients(model) as gradients:
        changed = gradients["blocks.0.qkv.weight"] / found["gradients"]["blocks.0.qkv.weight"]
        found["changed"] = (float(changed.nanmean()), float(gradients["norm.bias"].abs().max()))
    optimizer.step()
    optimizer.zero_grad()
    found["class"] = type(model).__name__, isinstance(model.blocks[0].qkv, nn.Linear)
    found["mesh"] = engine.mesh.mesh_dim_names, tuple(engine.mesh.mesh.shape)
    found["gathered"] = engine.gather(torch.tensor([engine.process_index])).tolist()
    found["data"] = engine.num_data_ranks, engine.data_index, batch.tolist()
    for what, act in {
        "state_dict": model.state_dict,
        "part": model.blocks[0].state_dict,
        "load": lambda: model.load_state_dict({}),
        "full": lambda: engine.full_parameters(model).__enter__(),
        "states": lambda: optimizer.state[model.norm.weight],
        "shape": lambda: engine.load_state_dict(model, {"head.weight": torch.zeros(3, 3)}, strict=False),
    }.items():
        try:
            act()
            found[what] = "nothing was said"
        except UserError as error:
            found[what] = error.what
    engine.save_model(model, tmp)
    before = engine.get_state_dict(model)
    engine.load_weights(model, tmp)
    after = engine.get_state_dict(model)
    found["weights"] = all(torch.equal(before[name], after[name]) for name in before)
    engine.free_memory()
    engine, model, *_ = prepared("awkward", 2, 3)
    engine.load_weights(model, tmp)
    at_three = engine.get_state_dict(model)
    found["weights at stage 3"] = all(torch.equal(before[name], at_three[name]) for name in before)
    engine.free_memory()
    return found


def test_whole_gradients_weights_and_refusals(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    found = run_ranks(_features, 4, str(tmp_path / "weights"))
    engine, model, *_ = prepared("awkward", 1, 0)
    engine.backward(loss_of("awkward", model, torch.stack(samples()[:4])))
    with engine.gradients(model) as gradients:
        for name, grad in gradients.items():
            for of_rank in found:
                torch.testing.assert_close(of_rank["gradients"][name], grad, rtol=1e-4, atol=2e-6)
    engine.free_memory()
    for rank, of_rank in enumerate(found):
        assert of_rank["changed"][0] == pytest.approx(2.0) and of_rank["changed"][1] == 0.0
        assert of_rank["class"] == ("Awkward", True)
        assert of_rank["mesh"] == (("pp", "dp", "cp", "tp"), (1, 2, 1, 2))
        assert of_rank["gathered"] == [rank % 2, 2 + rank % 2]
        assert of_rank["data"] == (2, rank // 2, torch.stack(samples()[2 * (rank // 2) :][:2]).tolist())
        for what in ("state_dict", "part", "load"):
            assert "cut over 2 tensor-parallel ranks" in of_rank[what]
        assert "full_parameters of a model that is cut" in of_rank["full"]
        assert "optimizer.state[norm.weight] cannot be had" in of_rank["states"]
        assert of_rank["shape"] == "head.weight is [3, 3] in the state and [37, 18] in the model"
        assert of_rank["weights"] and of_rank["weights at stage 3"]


def _kept(kind: str, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Train with what else the engine offers; return the losses, and whether whole parameters are alike over ranks."""
    engine, model, optimizer, loader = prepared("llama", 2, stage, **sections)
    found = steps("llama", engine, model, optimizer, loader)
    norms = torch.cat([param.detach().flatten().double() for name, param in model.named_parameters() if "norm" in name])
    if stage < 3:
        parts = [torch.zeros_like(norms) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, norms)
        found["alike"] = all(torch.equal(parts[0], part) for part in parts)
    engine.free_memory()
    return found


KINDS: list[tuple[str, int, dict[str, Any], float]] = [
    ("bf16", 2, {"precision": {"dtype": "bf16"}}, 3e-2),
    ("recomputed", 3, {"activation_checkpointing": {"mode": "full"}}, 1e-5),
    ("offloaded", 2, {"offload": {"optimizer": "cpu"}}, 1e-5),
]


@pytest.mark.parametrize(("kind", "stage", "sections", "tolerance"), KINDS)
def test_formats_recomputation_and_homes_go_with_it(
    run_ranks: Callable[..., Any], kind: str, stage: int, sections: dict[str, Any], tolerance: float
) -> None:
    alone = _exact()
    for found in run_ranks(_kept, 4, kind, stage, sections):
        assert found["losses"] == pytest.approx(alone["losses"], abs=tolerance)
        assert found["norms"] == pytest.approx(alone["norms"], rel=max(tolerance, 2e-5))
        assert found.get("alike", True)


@functools.cache
def _exact() -> dict[str, Any]:
    engine, model, optimizer, loader = prepared("llama", 1, 0)
    found = steps("llama", engine, model, optimizer, loader)
    engine.free_memory()
    return found


def _overflow() -> dict[str, Any]:
    """Let one rank's piece overflow in fp16: all ranks skip the step."""
    engine, model, optimizer, loader = prepared("llama", 2, 1, precision={"dtype": "fp16"})
    before = engine.get_state_dict(model)
    skipped: list[bool] = []
    for ids_BT in loader:
        engine.backward(loss_of("llama", model, ids_BT))
        with engine.gradients(model) as gradients:
            if not skipped:
                gradients["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")  # of the first rank's piece
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(engine.optimizer_step_was_skipped)
    after = engine.get_state_dict(model)
    engine.free_memory()
    moved = float((after["lm_head.weight"] - before["lm_head.weight"]).abs().max())
    return {"skipped": skipped, "scale": engine.scaler.scale if engine.scaler else 0.0, "moved": moved}


def test_an_overflow_of_one_piece_is_everybodys(run_ranks: Callable[..., Any]) -> None:
    found = run_ranks(_overflow, 2)
    assert found[0] == found[1] and found[0]["skipped"] == [True, False, False, False, False]
    assert found[0]["scale"] == 32768.0 and found[0]["moved"] > 0.0


class Dropping(nn.Module):
    """Dropout inside a cut region and outside of it, kept for the test to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.masks: list[tuple[str, torch.Tensor]] = []

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        inside = F.dropout(torch.ones_like(self.up(x_BD)), 0.5, self.training)
        self.masks.append(("inside", inside))
        x_BD = self.down(self.up(x_BD) * inside)
        outside = F.dropout(torch.ones_like(x_BD), 0.5, self.training)
        self.masks.append(("outside", outside))
        return sum((block(x_BD * outside) for block in self.blocks), x_BD)


def _dropped() -> dict[str, Any]:
    engine = distui.Engine(strategy={"tensor_parallel": 2})
    torch.manual_seed(engine.process_index)  # as a script that seeds each rank by its number
    model = Dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = engine.prepare(model, optimizer, plan={"up": "colwise", "down": "rowwise"})
    x_BD = torch.linspace(-1, 1, 32).view(4, 8)
    for _ in range(2):
        engine.backward(checkpoint(model, x_BD, use_reentrant=False).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    found = {kind: [mask.tolist() for name, mask in model.masks if name == kind] for kind in ("inside", "outside")}
    whole = model.blocks[0].weight.tolist()
    draw = float(torch.rand(()))
    engine.free_memory()
    return found | {"whole": whole, "draw": draw}


def test_dropout_is_one_for_all_outside_and_another_on_each_rank_inside(run_ranks: Callable[..., Any]) -> None:
    first, second = run_ranks(_dropped, 2)
    assert first["outside"] == second["outside"] and first["whole"] == second["whole"]
    assert first["inside"][0] != second["inside"][0]
    for found in (first, second):  # forward, its recomputation, the next forward, its recomputation
        for kind in ("inside", "outside"):
            masks = found[kind]
            assert len(masks) == 4 and masks[0] == masks[1] and masks[2] == masks[3] and masks[0] != masks[2]
    assert first["draw"] == second["draw"]


def _wrong(what: str) -> str:
    try:
        if what == "muon":
            engine = distui.Engine(strategy={"tensor_parallel": 2})
            model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
            plan = {"0": "colwise", "1": "rowwise"}
            engine.prepare(model, torch.optim.Muon(model.parameters(), lr=0.1), plan=plan)
        elif what == "partial":
            engine = distui.Engine(strategy={"tensor_parallel": 2})
            model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 8))
            model, optimizer = engine.prepare(
                model, torch.optim.SGD(model.parameters(), lr=0.1), plan={"0": "colwise", "2": "rowwise"}
            )
            engine.backward(model(torch.linspace(-1, 1, 32).view(4, 8)).square().sum())
            optimizer.step()
        elif what == "again":
            engine, model, *_ = prepared("encoder", 2, 0)
            engine.free_memory()
            distui.Engine().prepare(model)
        elif what == "kernels":
            engine, model, *_ = prepared("encoder", 2, 0)
            engine.use_kernels(model)
        elif what == "batches":
            engine, model, *_ = prepared("encoder", 2, 0)
            model(torch.full((2, 3), 1 + engine.process_index))
        else:
            engine = distui.Engine(strategy={"tensor_parallel": 2, "tensor_plan": what})
            engine.prepare(Dropping() if what != "mha" else nn.MultiheadAttention(9, 3))
    except UserError as error:
        return f"{error.what}: {error.why}: {error.fix}"
    return "nothing was said"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("muon", "the optimizer Muon with strategy.tensor_parallel=2"),
        ("partial", "the gradient of 1.weight is another on each tensor-parallel rank"),
        ("again", "encoder.layers.0.self_attn.in_proj_weight is a piece of (24, 16): the model was cut"),
        ("kernels", "use_kernels with axes that cut the model"),
        ("batches", "tensor-parallel ranks were given different batches"),
        ("", "no tensor-parallel plan is known for Dropping: 4 matrices are covered by none: up (16, 8), down (8, 16)"),
        ("ups=colwise", "the rule ups=colwise of the tensor plan matches nothing: nothing in Dropping has such a name"),
        ("up=columns", "the style columns of up is unknown: known: colwise, packed_colwise"),
        ("up", "strategy.tensor_plan has 'up': a rule is name=style"),
    ],
)
def test_what_cannot_be_is_said_on_every_rank(run_ranks: Callable[..., Any], what: str, said: str) -> None:
    for found in run_ranks(_wrong, 2, what):
        assert found.startswith(said), found


def _from_meta(tensor: int, stage: int, folder: str) -> dict[str, Any]:
    """Start from nothing on meta: by seeds, and out of files."""
    found = {}
    for kind, weights in (("seeds", None), ("files", folder)):
        engine = distui.Engine(strategy={"tensor_parallel": tensor, "zero_stage": stage})
        with distui.init_empty_weights():
            model = build("llama")
        model = engine.prepare(model, weights=weights)
        found[kind] = engine.get_state_dict(model)
        engine.free_memory()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_models_on_meta_begin_as_one_process_begins_them(
    run_ranks: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    saved = build("llama", 7).state_dict()
    save_file({name: value.clone() for name, value in saved.items()}, tmp_path / "model.safetensors")
    (alone,) = run_ranks(_from_meta, 1, 1, 0, str(tmp_path))
    for found in run_ranks(_from_meta, 4, 2, stage, str(tmp_path)):
        assert _equal(found["seeds"], alone["seeds"]) and _equal(found["files"], saved)
