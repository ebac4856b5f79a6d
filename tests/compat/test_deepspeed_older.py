"""Elastic batches, curricula, LAMB and 0/1 Adam by DeepSpeed's numbers; 0.19 dropped some, and scripts ask for them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch

from distui.compat.deepspeed.configuration import settle
from distui.compat.deepspeed.curricula import schedulers
from distui.compat.deepspeed.elasticity import ElasticityError, ElasticityIncompatibleWorldSize, compute_elastic_config
from distui.compat.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from distui.compat.deepspeed.ops.lamb import FusedLamb
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.compat.deepspeed.optim.zero_one_adam import ZeroOneAdam
from distui.compat.not_offered import NotOffered
from distui.core.errors import ConfigError

MICRO = "train_micro_batch_size_per_gpu"
ELASTIC = {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2, 3]}


def test_elastic_batches_are_deepspeeds() -> None:
    """The numbers are those of DeepSpeed 0.17.6."""
    wide = {"enabled": True, "max_train_batch_size": 10000, "micro_batch_sizes": [8, 12, 16, 17]}
    wide |= {"min_gpus": 32, "max_gpus": 1500, "version": 0.1}
    total, ranks = compute_elastic_config({"elasticity": wide}, "0.17.6")
    assert (total, len(ranks), ranks[:5], ranks[-1]) == (9792, 23, [32, 34, 36, 48, 51], 1224)
    assert compute_elastic_config({"elasticity": wide}, "0.17.6", 64)[2] == 17
    nodes = {"enabled": True, "max_train_batch_size": 500, "micro_batch_sizes": [2, 4, 6], "max_gpus": 64}
    nodes |= {"num_gpus_per_node": 4, "model_parallel_size": 2}
    found = compute_elastic_config({"elasticity": nodes}, "0.17.6", 8)
    assert found == (480, [2, 4, 6, 8, 10, 12, 16, 20, 24, 30], 6)
    with pytest.raises(ElasticityIncompatibleWorldSize, match=r"World size \(5\).*16, 24\]"):
        compute_elastic_config({"elasticity": {**ELASTIC, "version": 0.1}}, "0.17.6", 5)
    for wrong in ({"version": 0.3}, {"micro_batch_sizes": [0]}, {"min_gpus": 3, "max_gpus": 2}, {"min_gpus": 60}):
        with pytest.raises(ElasticityError):
            compute_elastic_config({"elasticity": {**ELASTIC, **wrong}}, "0.17.6", 2)
    helper = importlib.import_module("distui.compat.deepspeed.runtime.data_pipeline.data_routing.helper")
    assert helper.convert_to_random_ltd
    for path in ("elasticity.elasticity", "elasticity.config"):
        assert importlib.import_module(f"distui.compat.deepspeed.{path}").ElasticityConfig


def test_the_engines_batch_is_the_elastic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks, accumulation in ((1, 16), (2, 8), (4, 4)):
        settings = settle({"elasticity": ELASTIC}, ranks)
        assert (settings.train_batch_size, settings.micro_size, settings.accumulation) == (48, 3, accumulation)
    with pytest.raises(ElasticityError, match=MICRO):
        settle({MICRO: 2, "elasticity": ELASTIC}, 2)
    assert settle({MICRO: 2, "elasticity": {**ELASTIC, "ignore_non_elastic_batch_info": True}}, 2).micro_size == 3
    with pytest.raises(ConfigError, match="micro_batch_size"):
        settle({"elasticity": {**ELASTIC, "micro_batch_size": 2}}, 2)
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", '{"max_train_batch_size": 32, "micro_batch_sizes": [2, 3]}')
    with pytest.raises(ElasticityError, match="the scheduler saw max_acceptable_batch_size=32"):
        settle({"elasticity": ELASTIC}, 2)


def _curriculum(kind: str, **details: Any) -> dict[str, Any]:
    bounds = {"curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 40}
    section = {"enabled": True, **bounds, "schedule_type": kind, "schedule_config": details}
    return {MICRO: 1, "curriculum_learning": section}


def test_curricula_go_by_deepspeeds_formulas() -> None:
    """The numbers are those of DeepSpeed 0.17.6."""
    steps = {"total_curriculum_step": 10, "difficulty_step": 8}
    for config, expected in (
        (_curriculum("fixed_linear", **steps), [8, 8, 16, 16, 24, 24, 24, 32, 32, 40, 40]),
        (_curriculum("fixed_root", **steps, root_degree=2), [16, 16, 24, 24, 24, 32, 32, 32, 32, 40, 40]),
        (_curriculum("fixed_discrete", difficulty=[8, 20, 40], max_step=[2, 4]), [8, 8, 20, 20, 40, 40, 40]),
    ):
        curriculum, _ = schedulers(settle(config, 1))
        assert curriculum is not None
        assert [curriculum.update_difficulty(step) for step in range(1, len(expected) + 1)] == expected
    for wrong in (
        _curriculum("fixed_linear", difficulty_step=8),
        _curriculum("fixed_discrete", difficulty=[8, 20], max_step=[2, 4]),
        _curriculum("fixed_cubic"),
        _curriculum("fixed_linear", **steps, total_steps=3),
    ):
        with pytest.raises(ConfigError, match="schedule"):
            schedulers(settle(wrong, 1))
    with pytest.raises(NotOffered, match="data_sampling"):
        settle({MICRO: 1, "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}, 1)
    with pytest.raises(ConfigError, match="total_layer_num: is missing"):
        schedulers(settle({MICRO: 1, "data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, 1))


def _stepped(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draws)
        optimizer.step()


def _pair() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.zeros(4))]


def test_lamb_is_that_of_the_paper_with_deepspeeds_limits() -> None:
    params, plain = _pair(), [param.detach().clone() for param in _pair()]
    settings = {"lr": 0.1, "weight_decay": 0.1, "max_coeff": 0.9, "min_coeff": 0.05}
    optimizer = build_optimizer({"type": "Lamb", "params": settings}, params)
    assert type(optimizer) is FusedLamb
    _stepped(optimizer, params, 4)
    draws = torch.Generator().manual_seed(1)
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in plain]
    ratios: list[float] = []
    for step in range(1, 5):
        ratios = []
        for param, (first, second) in zip(plain, moments, strict=True):
            grad = torch.randn(param.shape, generator=draws)
            first.copy_(0.9 * first + 0.1 * grad)
            second.copy_(0.999 * second + 0.001 * grad * grad)
            update = first / (second.sqrt() + 1e-8) + 0.1 * param
            ratio = min(0.9, max(0.05, float(param.norm() / update.norm()))) if param.norm() > 0 else 1.0
            ratios.append(ratio)
            rate = 0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            param -= rate * ratio * update
    torch.testing.assert_close([param.detach() for param in params], plain)
    assert optimizer.get_lamb_coeffs() == pytest.approx(ratios)
    with pytest.raises(NotOffered, match="write gradient_clipping"):
        FusedLamb(params, max_grad_norm=1.0)
    with pytest.raises(NotOffered, match="use Lamb"):
        build_optimizer({"type": "OneBitLamb"}, params)


# Of DeepSpeed 0.17.6's own ZeroOneAdam over a channel that loses nothing, after 30 steps.
ZERO_ONE: dict[tuple[int, int, int, int], list[float]] = {
    (100000, 2, 100, 16): [0.34022271633148193, 0.12686702609062195],
    (6, 2, 3, 4): [0.6526671648025513, 0.11497102677822113],
}


@pytest.mark.parametrize("policy", list(ZERO_ONE))
def test_zero_one_adam_is_deepspeeds_over_an_exact_channel(policy: tuple[int, int, int, int]) -> None:
    names = ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
    settings = {"lr": 0.01, "weight_decay": 0.1, **dict(zip(names, policy, strict=True))}
    params = _pair()
    optimizer = build_optimizer({"type": "ZeroOneAdam", "params": settings}, params)
    assert type(optimizer) is ZeroOneAdam
    before = [param.detach().clone() for param in params]
    _stepped(optimizer, params, 1)
    torch.testing.assert_close([param.detach() for param in params], before)
    resumed = copy.deepcopy(params)
    optimizer = build_optimizer({"type": "ZeroOneAdam", "params": settings}, params)
    assert optimizer is not None
    _stepped(optimizer, params, 30)
    assert [float(param.detach().flatten()[1]) for param in params] == pytest.approx(ZERO_ONE[policy], abs=2e-6)
    half = build_optimizer({"type": "ZeroOneAdam", "params": settings}, resumed)
    assert half is not None
    whole = build_optimizer({"type": "ZeroOneAdam", "params": settings}, resumed)
    assert whole is not None
    draws = torch.Generator().manual_seed(1)
    for step in range(30):
        if step == 13:  # as after a checkpoint: nothing is known but the states
            whole.load_state_dict(half.state_dict())
        for param in resumed:
            param.grad = torch.randn(param.shape, generator=draws)
        (half if step < 13 else whole).step()
    torch.testing.assert_close([param.detach() for param in resumed], [param.detach() for param in params])


def test_names_that_build_torchs_adam_can_be_asked_by_isinstance() -> None:
    adam, host = FusedAdam(_pair(), lr=0.1), DeepSpeedCPUAdam(_pair())
    assert type(adam) is torch.optim.AdamW and adam.param_groups[0]["weight_decay"] == 0.0
    assert isinstance(adam, FusedAdam) and not isinstance(adam, DeepSpeedCPUAdam)
    assert isinstance(host, DeepSpeedCPUAdam) and not isinstance(host, FusedAdam)
    assert not isinstance(torch.optim.AdamW(_pair()), FusedAdam) and not isinstance(3, FusedAdam)
    assert isinstance(build_optimizer({"type": "Adam"}, _pair()), FusedAdam)
    assert isinstance(build_optimizer({"type": "Adam"}, _pair(), in_host=True), DeepSpeedCPUAdam)
    own = build_optimizer({"type": "Adam", "params": {"torch_adam": True}}, _pair(), in_host=True)
    assert not isinstance(own, (FusedAdam, DeepSpeedCPUAdam))
    with pytest.raises(NotOffered, match="bias_correction"):
        DeepSpeedCPUAdam(_pair(), bias_correction=False)


def test_a_class_that_derives_from_them_is_refused() -> None:
    for maker in (FusedAdam, DeepSpeedCPUAdam):
        with pytest.raises(NotOffered, match="its methods would not be called"):
            type("Mine", (maker,), {"step": lambda self: None})
