"""The same script on every backend: one process of plain torch is what each must equal, and each loads the others."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.dist.rank_pool import RankPool, RunRanks

VOCAB, NUM_SAMPLES, GLOBAL_BATCH = 31, 48, 12

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
slow = pytest.mark.timeout(400)
"""DeepSpeed takes 10 s to import and to load its operation, in every rank that starts."""
BACKENDS = [
    pytest.param("ddp", 0, id="ddp"),
    pytest.param("fsdp2", 2, id="fsdp2-keep"),
    pytest.param("fsdp2", 3, id="fsdp2"),
    *(pytest.param("deepspeed", stage, id=f"deepspeed{stage}", marks=[needs_deepspeed, slow]) for stage in range(4)),
]


class Model(nn.Module):
    """Blocks, a tied head, a frozen layer, a buffer, and an attribute that scripts read."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"name": "tiny"}
        self.embedding = nn.Embedding(VOCAB, 18)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(18, 18), nn.Tanh()) for _ in range(3))
        self.frozen = nn.Linear(18, 18).requires_grad_(False)
        self.head = nn.Linear(18, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.frozen(x))


def _model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def _optimizer(model: nn.Module, clamps: bool = False) -> torch.optim.Optimizer:
    if clamps:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    decayed = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    plain = [param for param in model.parameters() if param.requires_grad and param.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01)


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.flatten())


def _ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (NUM_SAMPLES, 5), generator=torch.Generator().manual_seed(1))


def _script(num_steps: int, accumulation: int, clip: float, seed: int = 0, **sections: Any) -> dict[str, Any]:
    """Train as any user's script would: nothing in it depends on the backend."""
    load_from, save_to = sections.pop("load_from", None), sections.pop("save_to", None)
    clamps = sections.pop("clamps", False)
    engine = distui.Engine(batch={"global_size": GLOBAL_BATCH, "accumulation": accumulation}, **sections)
    model: Any = _model(seed if engine.process_index == 0 else 77)
    optimizer = _optimizer(model, clamps)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = DataLoader(TensorDataset(_ids()), batch_size=GLOBAL_BATCH)
    model, optimizer, loader, scheduler = engine.prepare(model, optimizer, loader, scheduler)
    assert model.config["name"] == "tiny" and isinstance(model, Model)
    assert list(inspect.signature(model.forward).parameters) == ["ids"]
    if load_from:
        engine.load_state(load_from)
    found: dict[str, Any] = {"losses": [], "norms": [], "evaluated": [], "skipped": []}
    found["loaded"] = engine.get_state_dict(model)
    total = torch.zeros(())
    while len(found["losses"]) < num_steps:
        for (ids,) in loader:
            model.train()
            with engine.accumulate(model):
                with engine.autocast():
                    loss = _loss(model, ids)
                engine.backward(loss)
                norm = None
                if clamps:
                    engine.clip_grad_value_(model.parameters(), clip)
                else:
                    norm = engine.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total = total + engine.reduce(loss.detach(), "mean") / accumulation
            if not engine.sync_gradients:
                continue
            found["losses"].append(total.item())
            found["norms"].append(norm.item() if norm is not None else None)
            found["skipped"].append(engine.optimizer_step_was_skipped)
            total = torch.zeros(())
            model.eval()
            with torch.no_grad():
                found["evaluated"].append(_loss(model, _ids()[:8]).item())
            if len(found["losses"]) == num_steps:
                break
    found["memory"] = engine.memory_report()
    found["rate"] = scheduler.get_last_lr()[0]
    found["state"] = engine.get_state_dict(model)
    with engine.full_parameters(model, writeback=True):
        found["whole"] = {name: param.detach().float().clone() for name, param in model.named_parameters()}
        if sections.get("precision") is None:
            with torch.no_grad():
                model.get_parameter("layers.0.0.bias").add_(1.0)
    found["written"] = engine.get_state_dict(model)["layers.0.0.bias"]
    engine.load_state_dict(model, found["state"])
    found["reloaded"] = engine.get_state_dict(model)
    if save_to:
        engine.save_state(save_to, asynchronous=True)
        engine.save_model(model, f"{save_to}-model")
    found["step"] = engine.clock.step
    engine.end_training()
    return found


def _plain(num_steps: int, clip: float, clamps: bool = False) -> dict[str, Any]:
    model = _model()
    optimizer = _optimizer(model, clamps)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses, norms, evaluated = [], [], []
    for step in range(num_steps):
        ids = _ids().split(GLOBAL_BATCH)[step % (NUM_SAMPLES // GLOBAL_BATCH)]
        loss = _loss(model, ids)
        loss.backward()
        if clamps:
            nn.utils.clip_grad_value_(model.parameters(), clip)
        else:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            evaluated.append(_loss(model, _ids()[:8]).item())
    return {
        "losses": losses,
        "norms": norms,
        "evaluated": evaluated,
        "rate": scheduler.get_last_lr()[0],
        "state": dict(model.state_dict()),
    }


@pytest.fixture
def backend_ranks(request: pytest.FixtureRequest, rank_pool: RankPool) -> Iterator[RunRanks]:
    """Give `run_ranks`; DeepSpeed keeps the process group that it saw first, so it gets processes of its own."""
    fresh = "deepspeed" in request.node.name
    if fresh:
        rank_pool.close()
    yield partial(rank_pool.run, timeout_s=180) if fresh else rank_pool.run
    if fresh:
        rank_pool.close()


def _on(backend: str, stage: int, **sections: Any) -> dict[str, Any]:
    return {"strategy": {"backend": backend, "zero_stage": stage}, **sections}


def _train(num_steps: int, accumulation: int, clip: float, sections: dict[str, Any]) -> dict[str, Any]:
    return _script(num_steps, accumulation, clip, **sections)


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (3, 2)])
@pytest.mark.parametrize(("backend", "stage"), BACKENDS)
def test_the_same_script_is_plain_torch(
    backend_ranks: RunRanks, backend: str, stage: int, num_ranks: int, accumulation: int
) -> None:
    expected = _plain(6, 0.5)
    for found in backend_ranks(_train, num_ranks, 6, accumulation, 0.5, _on(backend, stage)):
        assert found["step"] == 6 and not any(found["skipped"])
        torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["evaluated"], expected["evaluated"], atol=1e-5, rtol=1e-5)
        assert found["rate"] == pytest.approx(expected["rate"])
        torch.testing.assert_close(found["state"], expected["state"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            found["whole"], {k: expected["state"][k] for k in found["whole"]}, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(found["written"], found["state"]["layers.0.0.bias"] + 1.0)
        assert all(torch.equal(found["reloaded"][name], found["state"][name]) for name in found["state"])
        assert found["memory"]["parameters"] > 0 and found["memory"]["optimizer_states"] > 0


LEGS = [("native", 3, 2), ("ddp", 0, 3), ("fsdp2", 3, 2), ("native", 1, 3), ("fsdp2", 2, 3), ("ddp", 0, 1)]
DEEPSPEED_LEGS = [("native", 2), *(("deepspeed", stage) for stage in (1, 2, 3, 0, 2)), ("ddp", 0)]


def _leg(backend: str, stage: int, folder: str, number: int) -> dict[str, Any]:
    path = str(Path(folder) / str(number - 1)) if number else None
    sections = {**_on(backend, stage), "load_from": path, "save_to": str(Path(folder) / str(number)), "seed": number}
    return _script(3, 1, 0.5, **sections)


def _legs(legs: list[tuple[str, int]], folder: str) -> list[dict[str, Any]]:
    return [_leg(*leg, folder, number) for number, leg in enumerate(legs)]


def _see_that_it_went_on(legs: list[dict[str, Any]], folder: Path) -> None:
    expected = _plain(3 * len(legs), 0.5)
    for number, found in enumerate(legs):
        if number:
            before = legs[number - 1]["state"]
            assert found["loaded"].keys() == before.keys()
            assert all(torch.equal(found["loaded"][name], before[name]) for name in before), "weights must be bit-exact"
        weights = load_file(folder / f"{number}-model" / "model.safetensors")
        assert all(torch.equal(weights[name], found["state"][name]) for name in weights)
        assert set(weights) == set(found["state"]) - {"head.weight"}
        assert found["step"] == 3 * (number + 1)
    losses = [loss for found in legs for loss in found["losses"]]
    torch.testing.assert_close(losses, expected["losses"], atol=2e-5, rtol=1e-5)
    assert legs[-1]["rate"] == pytest.approx(expected["rate"])


def test_any_backend_goes_on_from_what_another_saved(run_ranks: RunRanks, tmp_path: Path) -> None:
    found = []
    for number, (backend, stage, num_ranks) in enumerate(LEGS):
        found.append(run_ranks(_leg, num_ranks, backend, stage, str(tmp_path), number)[-1])
    _see_that_it_went_on(found, tmp_path)


@needs_deepspeed
@slow
def test_others_and_deepspeed_go_on_from_each_other(backend_ranks: RunRanks, tmp_path: Path) -> None:
    _see_that_it_went_on(backend_ranks(_legs, 2, DEEPSPEED_LEGS, str(tmp_path))[-1], tmp_path)


@pytest.mark.parametrize(("backend", "stage"), BACKENDS)
def test_mixed_precision_and_value_clipping(backend_ranks: RunRanks, backend: str, stage: int) -> None:
    first, second = backend_ranks(_formats, 2, backend, stage)
    assert first["fp16"]["skipped"] == second["fp16"]["skipped"]
    assert first["fp16"]["skipped"][0] and not first["fp16"]["skipped"][-1], "a scale of 2**24 overflows at first"
    assert first["fp16"]["losses"][0] == first["fp16"]["losses"][4], "a skipped step must not move the weights"
    for dtype, step in (("bf16", 1), ("fp16", 4)):
        losses = first[dtype]["losses"][::step]
        assert losses[-1] < losses[0] and losses == second[dtype]["losses"][::step]
    plain = _plain(4, 0.001, clamps=True)
    torch.testing.assert_close(first["clamped"]["losses"], plain["losses"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first["clamped"]["state"], plain["state"], atol=1e-5, rtol=1e-4)


def _formats(backend: str, stage: int) -> dict[str, Any]:
    fp16 = {"dtype": "fp16", "initial_loss_scale": 2.0**24}
    # DeepSpeed takes one model a backend, so each engine is a new one.
    return {
        "bf16": _script(8, 1, 0.5, **_on(backend, stage, precision={"dtype": "bf16"})),
        "fp16": _script(24, 1, 0.5, **_on(backend, stage, precision=fp16)),
        "clamped": _script(4, 1, 0.001, clamps=True, **_on(backend, stage)),
    }


def _no_sync(backend: str, stage: int) -> dict[str, torch.Tensor]:
    engine = distui.Engine(**_on(backend, stage))
    model: Any = _model()
    trainable = [param for param in model.parameters() if param.requires_grad]
    model, optimizer = engine.prepare(model, torch.optim.SGD(trainable, lr=0.1))
    batches = _ids()[:24].view(3, 2, 4, 5)
    for index in range(2):
        with engine.no_sync(model):
            engine.backward(_loss(model, batches[index][engine.process_index]))
    engine.backward(_loss(model, batches[2][engine.process_index]))
    optimizer.step()
    state = engine.get_state_dict(model)
    copied = None if backend != "ddp" else copy.deepcopy(model)
    assert engine.free_memory(model) == [None]
    assert copied is None or type(copied.forward.__func__) is type(Model.forward), "a copy is a plain model"
    return state


@pytest.mark.parametrize(("backend", "stage"), BACKENDS)
def test_no_sync_adds_up_and_memory_is_freed(backend_ranks: RunRanks, backend: str, stage: int) -> None:
    model = _model()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    for batch in _ids()[:24].view(3, 8, 5):
        _loss(model, batch).backward()
    optimizer.step()
    for state in backend_ranks(_no_sync, 2, backend, stage):
        torch.testing.assert_close(state, dict(model.state_dict()), atol=1e-6, rtol=1e-5)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def _with_unused(find: bool) -> float:
    engine = distui.Engine(strategy={"backend": "ddp", "find_unused_parameters": find})
    model = Branches()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        loss = model(torch.ones(2, 4)).square().mean()
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_ddp_names_parameters_that_take_no_part(run_ranks: RunRanks) -> None:
    with pytest.raises(UserError, match=r"2 of 4 parameters took no part in the loss, such as unused.weight"):
        run_ranks(_with_unused, 2, False)
    first, second = run_ranks(_with_unused, 2, True)
    assert first == second


def _other_models() -> list[str]:
    reports = []
    for backend, stage in (("ddp", 0), ("fsdp2", 3)):
        engine = distui.Engine(**_on(backend, stage))
        with pytest.raises(UserError) as caught:
            engine.prepare(nn.Linear(4 + engine.process_index, 2))
        reports.append(caught.value.report())
    return reports


def test_ranks_with_different_models_are_told(run_ranks: RunRanks) -> None:
    for report in run_ranks(_other_models, 2)[1]:
        assert "the ranks hold different models" in report and "(2, 5)" in report
