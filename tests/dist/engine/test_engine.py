"""The public API on real ranks: the training step of DESIGN's example, precision, accumulation, what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, NUM_SAMPLES, GLOBAL_BATCH = 31, 60, 12


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCAB, 16), nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), nn.Linear(16, VOCAB)
    )


def _loader(batch_size: int) -> DataLoader[Any]:
    ids = torch.randint(0, VOCAB, (NUM_SAMPLES, 7), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(ids), batch_size=batch_size)


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT).float().flatten(0, 1), ids_BT.flatten())


def _train(accumulation: int, num_epochs: int = 2, **sections: Any) -> dict[str, Any]:
    engine = distui.Engine(batch={"global_size": GLOBAL_BATCH, "accumulation": accumulation}, **sections)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    model, optimizer, loader, scheduler = engine.prepare(model, optimizer, _loader(GLOBAL_BATCH), scheduler)
    losses, norms, steps, total = [], [], 0, torch.zeros(())
    for _ in range(num_epochs):
        for (ids,) in loader:
            with engine.accumulate(model):
                loss = _loss(model, ids)
                engine.backward(loss)
                norm = engine.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total = total + engine.reduce(loss.detach(), "mean") / accumulation
            if engine.sync_gradients:
                assert norm is not None
                losses.append(total.item())
                norms.append(norm.item())
                steps += 1
                total = torch.zeros(())
            else:
                assert norm is None
    rate = scheduler.get_last_lr()[0]
    state = engine.get_state_dict(model)
    return {
        "losses": losses,
        "norms": norms,
        "steps": steps,
        "rate": rate,
        "state": state,
        "engine_step": engine.clock.step,
    }


def _plain(num_epochs: int = 2) -> dict[str, Any]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    dataset = _loader(1).dataset
    ids = torch.stack([dataset[index][0] for index in range(NUM_SAMPLES)])
    losses, norms = [], []
    for _ in range(num_epochs):
        for batch in ids.split(GLOBAL_BATCH):
            loss = _loss(model, batch)
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": losses, "norms": norms, "rate": scheduler.get_last_lr()[0], "state": model.state_dict()}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_number(run_ranks: RunRanks, mode: str, stage: int) -> None:
    expected = _plain()
    for found in run_ranks(_train_recomputing, 2, stage, mode):
        torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["state"], dict(expected["state"]), atol=1e-5, rtol=1e-4)
        assert found["forwards"] == {"full": [2, 2, 2], "selective": [2, 1, 2]}[mode], "forwards a backward, by block"


def _train_recomputing(stage: int, mode: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"strategy": {"zero_stage": stage}, "activation_checkpointing": {"mode": mode}}
    found = _train(1, **sections)
    engine = distui.Engine(**sections)
    model = _model()
    counts = [0, 0, 0]
    for index, layer in enumerate(model[1]):  # type: ignore[index]

        def count(*args: Any, index: int = index, forward: Any = layer.forward) -> Any:
            counts[index] += 1
            return forward(*args)

        layer.forward = count
    model, _ = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.backward(_loss(model, _loader(4).dataset[:4][0]))
    return found | {"forwards": counts}


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_documented_loop_is_plain_torch(run_ranks: RunRanks, stage: int, num_ranks: int, accumulation: int) -> None:
    expected = _plain()
    for found in run_ranks(_train_on_ranks, num_ranks, stage, accumulation):
        assert found["steps"] == found["engine_step"] == 10
        torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-5, rtol=1e-4)
        assert found["rate"] == pytest.approx(expected["rate"])
        torch.testing.assert_close(found["state"], dict(expected["state"]), atol=1e-5, rtol=1e-4)


def _train_on_ranks(stage: int, accumulation: int) -> dict[str, Any]:
    return _train(accumulation, strategy={"zero_stage": stage})


def _fp16(stage: int, initial: float, window: int) -> dict[str, Any]:
    engine = distui.Engine(
        strategy={"zero_stage": stage},
        precision={"dtype": "fp16", "initial_loss_scale": initial, "loss_scale_window": window},
    )
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    scheduler = engine.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 100))
    ids = _loader(4).dataset[engine.process_index * 4 : engine.process_index * 4 + 4][0]
    skipped, losses, counts = [], [], []
    for _ in range(12):
        loss = _loss(model, ids)
        engine.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(engine.optimizer_step_was_skipped)
        counts.append(scheduler.scheduler.last_epoch)
        losses.append(loss.item())
    assert engine.scaler is not None
    return {"skipped": skipped, "losses": losses, "counts": counts, "scaler": engine.scaler.state_dict()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_skips_overflowing_steps_on_all_ranks_alike(run_ranks: RunRanks, stage: int) -> None:
    first, second = run_ranks(_fp16, 2, stage, 2.0**20, 100)
    assert first["skipped"] == second["skipped"]
    num_skipped = sum(first["skipped"])
    assert 0 < num_skipped < 12 and first["skipped"][0]
    assert first["scaler"]["num_skipped"] == num_skipped
    assert first["counts"][-1] == 12 - num_skipped, "a skipped step must not move the schedule"
    assert first["losses"][0] == first["losses"][1], "a skipped step must not move the weights"
    assert first["losses"][-1] < first["losses"][0]


@pytest.mark.parametrize("stage", [0, 3])
def test_fp16_scale_grows_after_good_steps(run_ranks: RunRanks, stage: int) -> None:
    (found,) = run_ranks(_fp16, 1, stage, 8.0, 4)
    assert found["scaler"] == {"scale": 64.0, "good_steps": 12, "num_skipped": 0}


def _plain_clip_works_at_stage_0() -> tuple[float, float]:
    engine = distui.Engine(strategy={"zero_stage": 0})
    model = _model()
    model, _ = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = _loader(4).dataset[:4][0]
    engine.backward(_loss(model, ids))
    first = nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    engine.backward(_loss(model, ids))
    return first, nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()


def test_gradients_are_where_plain_code_reads_them_at_stage_0(run_ranks: RunRanks) -> None:
    for first, second in run_ranks(_plain_clip_works_at_stage_0, 2):
        assert first > 0
        assert second == pytest.approx(2 * first, rel=1e-5), "a second backward must add"


def _loss_backward_twice() -> None:
    engine = distui.Engine(strategy={"zero_stage": 0})
    model = _model()
    model, _ = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = _loader(4).dataset[:4][0]
    engine.backward(_loss(model, ids))
    _loss(model, ids).backward()


def test_a_backward_behind_the_engines_back_is_refused_where_it_would_be_wrong(run_ranks: RunRanks) -> None:
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\)"):
        run_ranks(_loss_backward_twice, 2)


def _no_sync_then_sync(stage: int) -> dict[str, torch.Tensor]:
    engine = distui.Engine(strategy={"zero_stage": stage})
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = _loader(4).dataset[:24][0].view(3, 2, 4, 7)
    for index in range(2):
        with engine.no_sync(model):
            engine.backward(_loss(model, batches[index][engine.process_index]))
    engine.backward(_loss(model, batches[2][engine.process_index]))
    optimizer.step()
    return engine.get_state_dict(model)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_no_sync_adds_up(run_ranks: RunRanks, stage: int) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in _loader(4).dataset[:24][0].view(3, 8, 7):
        _loss(model, batch).backward()
    optimizer.step()
    for state in run_ranks(_no_sync_then_sync, 2, stage):
        torch.testing.assert_close(state, dict(model.state_dict()), atol=1e-6, rtol=1e-5)


def _step_in_no_sync() -> bool:
    engine = distui.Engine(strategy={"zero_stage": 0})
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with engine.no_sync(model):
        engine.backward(_loss(model, _loader(4).dataset[:4][0]))
        params = list(model.parameters())
        for refused in (
            optimizer.step,
            lambda: engine.clip_grad_norm_(params, 0.1),
            lambda: engine.clip_grad_value_(params, 0.1),
            lambda: torch.nn.utils.clip_grad_norm_(params, 0.1),
        ):
            with pytest.raises(UserError, match="inside engine.no_sync"):
                refused()
    optimizer.step()
    return optimizer.step_was_skipped


def test_a_step_inside_no_sync_is_refused(run_ranks: RunRanks) -> None:
    assert run_ranks(_step_in_no_sync, 2) == [False, False]


def _zeroed_in_no_sync(stage: int) -> dict[str, torch.Tensor]:
    """Forget a first gradient inside, and leave two contexts in the order in which they were entered."""
    engine = distui.Engine(strategy={"zero_stage": stage})
    model = _model()
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first, second, third = _loader(4).dataset[:24][0].view(3, 2, 4, 7)[:, engine.process_index]
    outer, inner = engine.no_sync(model), engine.no_sync(model)
    outer.__enter__()
    engine.backward(_loss(model, first))
    inner.__enter__()
    outer.__exit__(None, None, None)
    optimizer.zero_grad()
    engine.backward(_loss(model, second))
    inner.__exit__(None, None, None)
    engine.backward(_loss(model, third))
    optimizer.step()
    return engine.get_state_dict(model)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_are_forgotten_inside_no_sync_as_in_plain_torch(run_ranks: RunRanks, stage: int) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in _loader(4).dataset[:24][0].view(3, 8, 7)[1:]:
        _loss(model, batch).backward()
    optimizer.step()
    for state in run_ranks(_zeroed_in_no_sync, 2, stage):
        torch.testing.assert_close(state, dict(model.state_dict()), atol=1e-6, rtol=1e-5)


def test_sections_are_validated_with_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        distui.Engine(strategy={"zero_stage": 7}, precision={"dtype": "fp8"})
    assert {problem.path for problem in caught.value.problems} == {"strategy.zero_stage", "precision.dtype"}
    with pytest.raises(ConfigError, match="is no section"):
        distui.Engine(strategi={})


def test_axes_that_are_not_there_are_refused_where_a_script_asks_for_them() -> None:
    with pytest.raises(ConfigError, match="do not divide the 1 ranks"):
        distui.Engine(strategy={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match="tensor_parallel=2 with backend=ddp: only the native backend does this"):
        distui.Engine(strategy={"tensor_parallel": 2, "backend": "ddp"})
    with pytest.raises(ConfigError, match="expert_parallel=2 does not divide the 1 data-parallel ranks"):
        distui.Engine(strategy={"expert_parallel": 2})


def test_an_optimizer_of_another_model_is_refused() -> None:
    engine = distui.Engine()
    with pytest.raises(UserError, match="belong to no prepared model"):
        engine.prepare(_model(), torch.optim.SGD(_model().parameters(), lr=0.1))


def test_objects_come_back_in_order_and_unknown_ones_unchanged() -> None:
    engine = distui.Engine()
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    marker = object()
    first, second, third = engine.prepare(optimizer, marker, model)
    assert third is model and second is marker
    assert isinstance(first, torch.optim.Optimizer) and first is not optimizer
    assert engine.prepare(model) is model
    assert engine.unwrap_model(model) is model


def test_every_name_of_the_contract_is_there() -> None:
    engine = distui.Engine()
    names = """
        prepare backward accumulate no_sync autocast sync_gradients clip_grad_norm_ gather gather_for_metrics reduce
        pad_across_processes wait_for_everyone main_process_first on_main_process is_main_process
        is_local_main_process process_index local_process_index num_processes device print log init_trackers
        end_training save_state load_state save_model unwrap_model get_state_dict register_for_checkpointing
        skip_first_batches free_memory set_trigger check_trigger
    """
    assert not [name for name in names.split() if not hasattr(engine, name)]


def _two_engines() -> list[float]:
    """Two engines of different stages in one process train two models at once."""
    engines = [distui.Engine(strategy={"zero_stage": stage}) for stage in (1, 3)]
    jobs = []
    for engine in engines:
        model = _model()
        jobs.append((engine, *engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))))
    ids = _loader(4).dataset[:4][0]
    losses = []
    for _ in range(3):
        for engine, model, optimizer in jobs:
            loss = _loss(model, ids)
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_several_engines_live_in_one_process(run_ranks: RunRanks) -> None:
    losses = run_ranks(_two_engines, 2)[0]
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-5)
    assert losses[-1] < losses[0]


def _metrics_of_a_short_batch() -> list[int]:
    engine = distui.Engine()
    loader = engine.prepare(DataLoader(TensorDataset(torch.arange(11)), batch_size=2))
    return [value for (batch,) in loader for value in engine.gather_for_metrics(batch).tolist()]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gather_for_metrics_is_exact(run_ranks: RunRanks, num_ranks: int) -> None:
    for values in run_ranks(_metrics_of_a_short_batch, num_ranks):
        assert values == list(range(11))


def test_max_grad_norm_clips_where_the_script_does_not() -> None:
    weights = []
    for max_norm, by_hand in ((0.1, False), (0.0, True)):
        engine = distui.Engine(optimizer={"max_grad_norm": max_norm})
        model = _model()
        model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        engine.backward(_loss(model, _loader(4).dataset[:4][0]))
        if by_hand:
            engine.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        weights.append(engine.get_state_dict(model))
    torch.testing.assert_close(weights[0], weights[1])
