"""An engine between and after steps: what it weighs, what it leaves behind, and optimizers that are unlike others."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

DIM = 12


def _model(seed: int = 0, dim: int = DIM, num_blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = (nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(num_blocks))
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(dim, dim + 1))


def _rows(step: int) -> torch.Tensor:
    return torch.randn(12, DIM, generator=torch.Generator().manual_seed(step))


def _engine(stage: int, **sections: Any) -> distui.Engine:
    partition.SMALL_UNIT_NUMEL = 1  # a unit a block
    return distui.Engine(strategy={"zero_stage": stage}, **sections)


def _step(engine: distui.Engine, model: nn.Module, step: int) -> None:
    engine.backward(model(_rows(step).chunk(engine.num_processes)[engine.process_index]).square().mean())


def _plain_step(model: nn.Module, step: int) -> None:
    model(_rows(step)).square().mean().backward()


Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]


def _muon_and_adam(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [param for param in model.parameters() if param.dim() == 2]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]


def _adafactor(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor(model.parameters(), lr=0.05)]


# ---- whole matrices ----------------------------------------------------------------------------------------------


def _forgotten_at_different_times(stage: int) -> None:
    """Each optimizer steps and forgets its own part, as in plain torch."""

    def train(model: nn.Module, optimizers: list[Any], backward: Callable[[int], None]) -> None:
        for step in range(6):
            backward(step)
            optimizers[0].step()
            optimizers[0].zero_grad()
            if step % 2:  # the second one steps on the gradients of two backward passes
                optimizers[1].step()
                optimizers[1].zero_grad()

    plain = _model()
    train(plain, _muon_and_adam(plain), lambda step: _plain_step(plain, step))
    engine = _engine(stage)
    model = _model()
    model, *optimizers = engine.prepare(model, *_muon_and_adam(model))
    train(model, optimizers, lambda step: _step(engine, model, step))
    torch.testing.assert_close(engine.get_state_dict(model), dict(plain.state_dict()), atol=2e-4, rtol=1e-3)
    assert engine.clock.step == 6


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_optimizers_forget_their_own_gradients(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_forgotten_at_different_times, 2, stage)


def _states(engine: distui.Engine, optimizers: list[Any]) -> dict[str, torch.Tensor]:
    """Return every optimizer state whole, put together from all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        mine = {
            f"{number}.{name}": (getattr(item, "start", 0), getattr(item, "local", item).clone(), item.shape)
            for name, item in engine.backend.optimizer_items(optimizer, (engine.process_index, 1)).items()
        }
        parts: list[Any] = [mine]
        if dist.is_initialized():
            parts = [None] * engine.num_processes
            dist.all_gather_object(parts, mine)
        for part in parts:
            for name, (start, local, shape) in part.items():
                into = whole.setdefault(name, torch.zeros(shape))
                into.view(-1)[start : start + local.numel()] = local.view(-1)
    return whole


def _save_matrices(make: Optimizers, stage: int, folder: str) -> Any:
    engine = _engine(stage)
    model = _model()
    model, *optimizers = engine.prepare(model, *make(model))
    for step in range(2):
        _step(engine, model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if engine.num_processes > 1 and make is _adafactor:
        # The states are divided: no rank has more than its share of the matrices, and the largest.
        held = sum(state["variance"].numel() for state in optimizers[0].state.values() if "variance" in state)
        assert engine.reduce(torch.tensor(held), "sum").item() == sum(
            p.numel() for p in _model().parameters() if p.dim() < 2
        )
        stepped = [run.param for runs in optimizers[0].runs for run in runs]
        assert all(param.numel() == 0 for param in stepped)
    engine.save_state(folder)
    return engine.get_state_dict(model), _states(engine, optimizers)


def _load_matrices(make: Optimizers, stage: int, folder: str) -> Any:
    engine = _engine(stage)
    model = _model(1)
    model, *optimizers = engine.prepare(model, *make(model))
    engine.load_state(folder)
    loaded = engine.get_state_dict(model), _states(engine, optimizers)
    _step(engine, model, 2)
    for optimizer in optimizers:
        optimizer.step()
    return *loaded, engine.get_state_dict(model)


def _plain_matrices(make: Optimizers) -> dict[str, Any]:
    model = _model()
    optimizers = make(model)
    for step in range(3):
        _plain_step(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("make", [_muon_and_adam, _adafactor])
def test_whole_matrices_reshard_in_checkpoints(run_ranks: RunRanks, tmp_path: Path, make: Optimizers) -> None:
    expected = _plain_matrices(make)
    weights, states = run_ranks(_save_matrices, 3, make, 3, str(tmp_path / "three"))[0]
    for world, stage in ((2, 1), (1, 0)):
        for found, found_states, after in run_ranks(_load_matrices, world, make, stage, str(tmp_path / "three")):
            torch.testing.assert_close(found, weights, atol=0, rtol=0)
            assert found_states.keys() == states.keys() and states
            torch.testing.assert_close(found_states, states, atol=0, rtol=0)
            torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-3)


class GlobalNorm(torch.optim.Optimizer):
    """Divides by the norm of all gradients: what it does to one matrix depends on the others."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.stack([param.grad.norm() for param in group["params"]]).norm()
            for param in group["params"]:
                param.sub_(param.grad / norm, alpha=group["lr"])


class GatheringMuon(torch.optim.Optimizer):
    """Divides the work over the ranks by itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                update = param.grad / param.grad.norm()
                dist.all_gather([update.clone() for _ in range(dist.get_world_size())], update)
                param.sub_(update, alpha=group["lr"])


def _refused(stage: int) -> list[str]:
    reasons = []
    for make in (
        torch.optim.LBFGS,
        torch.optim.SparseAdam,
        lambda params: GlobalNorm(params, {"lr": 0.1}),
        lambda params: GatheringMuon(params, {"lr": 0.1}),
    ):
        engine = _engine(stage)
        model = _model()
        try:
            engine.prepare(model, make(list(model.parameters())))
            reasons.append("")
        except UserError as error:
            reasons.append(error.why)
    return reasons


def test_optimizers_that_would_be_wrong_are_refused_with_a_reason(run_ranks: RunRanks) -> None:
    closure, sparse, depends, collectives = run_ranks(_refused, 2, 1)[0]
    assert "closure" in closure and "sparse" in sparse
    assert "depends on the others" in depends
    assert "runs collectives of its own (all_gather)" in collectives
    closure, sparse, *others = run_ranks(_refused, 2, 0)[0]
    assert "closure" in closure and "sparse" in sparse and others == ["", ""], "replicated states can be given whole"


# ---- steps that are unlike others --------------------------------------------------------------------------------


def _interrupted(stage: int) -> None:
    plain = _model()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    engine = _engine(stage)
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    def fail(*_: Any) -> None:
        raise FloatingPointError("in the middle")

    block = model[0][1]
    for step, register in enumerate(
        (
            lambda: block.register_forward_hook(fail),
            lambda: block.register_full_backward_hook(fail),
            lambda: block.register_full_backward_pre_hook(fail),
        )
    ):
        handle = register()
        with pytest.raises(FloatingPointError):
            _step(engine, model, 99)
        handle.remove()
        optimizer.zero_grad()
        optimizer.step()  # nothing to step: plain torch leaves weights without a gradient alone
        _step(engine, model, step)
        optimizer.step()
        optimizer.zero_grad()
        with engine.no_sync(model):
            _step(engine, model, 7)
        _step(engine, model, 8)
        optimizer.step()
        optimizer.zero_grad()
        for first, *rest in ((step,), (7, 8)):
            _plain_step(plain, first)
            for more in rest:
                _plain_step(plain, more)
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        torch.testing.assert_close(engine.get_state_dict(model), dict(plain.state_dict()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_step_after_an_exception_and_without_gradients(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_interrupted, 2, stage)


# ---- memory ------------------------------------------------------------------------------------------------------


def _live_bytes() -> int:
    """Return the bytes of all tensors that are alive, by their storages."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, nn.Parameter):
            for tensor in (value, value.grad):
                if tensor is not None and tensor.device.type == "cpu":
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


BUFFERS_LIMIT = {0: 0, 1: 2, 2: 5, 3: 8}
"""Blocks whose size the transient buffers may have in sum, as docs/training.md lists them."""


def _weighed() -> list[tuple[Any, ...]]:
    # Reading the gradients of whatever tensor there is warns.
    warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor that is not a leaf.*")
    found = []
    for stage in range(4):
        for dtype, reduce_dtype in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "same")):
            gc.collect()
            gc.freeze()  # what is there already is not looked at
            engine = _engine(stage, precision={"dtype": dtype, "reduce_dtype": reduce_dtype})
            model = _model(dim=160, num_blocks=6)
            model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            for _ in range(2):
                engine.backward(model(torch.randn(2, 160)).square().mean())
                engine.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found.append((stage, dtype, reduce_dtype, engine.memory_report(), _live_bytes()))
            del model, optimizer
            engine.free_memory()
            del engine
    gc.unfreeze()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_the_report_is_what_is_allocated_and_what_theory_says(run_ranks: RunRanks, world: int) -> None:
    num_params = sum(param.numel() for param in _model(dim=160, num_blocks=6).parameters())
    for what in run_ranks(_weighed, world)[0]:
        stage, dtype, reduce_dtype, report, allocated = what
        assert sum(report.values()) == pytest.approx(allocated, rel=0.02), what
        of = [world if stage >= sharded else 1 for sharded in (3, 2, 1)]
        weight = 4 if dtype == "fp32" else 2
        grad = 4 if "fp32" in (dtype, reduce_dtype) else 2
        theory = {
            "parameters": weight * num_params / of[0],
            "gradients": grad * num_params / of[1],
            "optimizer_states": (8 if dtype == "fp32" else 12) * num_params / of[2],
        }
        for category, nbytes in theory.items():
            assert report[category] == pytest.approx(nbytes, rel=0.02), (category, *what)
        block_bytes = 4 * 160 * 161
        assert report["buffers"] <= (BUFFERS_LIMIT[stage] if world > 1 else 0) * block_bytes, what


def _freed(stage: int) -> None:
    model = _model()
    hooks = [
        "_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
    ]  # fmt: skip
    engine = _engine(stage, precision={"dtype": "bf16"}, activation_checkpointing={"mode": "full"})
    held, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    _step(engine, held, 0)
    optimizer.step()
    before = engine.get_state_dict(held)
    assert engine.free_memory(held, optimizer) == [None, None]
    for name, module in model.named_modules():
        assert not any(getattr(module, kind) for kind in hooks), name
        assert not {"forward", "named_parameters", "zero_grad"} & set(vars(module)), name
    if stage == 3:
        assert all(not param.numel() for param in model.parameters())
        return
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name
    # A plain model: another engine takes it.
    model.float()
    again, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    _step(engine, again, 1)
    optimizer.step()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_freed_models_have_no_hooks(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_freed, 2, stage)
