"""DeepSpeed's JSON as `initialize` reads it, its schedules, and the names of its API."""

from __future__ import annotations

import argparse
import importlib
import math
from typing import Any

import pytest
import torch

from distui.compat import deepspeed
from distui.compat.deepspeed.configuration import settle
from distui.compat.deepspeed.lr_schedules import SCHEDULES, build_schedule
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.compat.deepspeed.precision import scaler_of
from distui.compat.not_offered import NotOffered, refuse_pipeline
from distui.core.config.schema import StrategySection
from distui.core.errors import ConfigError, UserError

MICRO = "train_micro_batch_size_per_gpu"


def _params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({MICRO: 4}, (8, 4, 1)),
        ({"train_batch_size": 32}, (32, 16, 1)),
        ({"train_batch_size": 32, MICRO: 4}, (32, 4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 2}, (32, 8, 2)),
        ({"train_batch_size": 16.0, MICRO: 4, "gradient_accumulation_steps": "auto"}, (16, 4, 2)),
    ],
)
def test_any_two_sizes_give_the_third(sizes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    config = settle(sizes, 2)
    assert (config.train_batch_size, config.micro_size, config.accumulation) == expected
    assert config.config.optimizer.max_grad_norm == 1.0  # as DeepSpeed 0.19 clips where nothing is said


def test_sizes_that_do_not_fit_are_told_with_the_equation_and_what_fits() -> None:
    with pytest.raises(ConfigError) as error:
        settle({"train_batch_size": 12, MICRO: 2, "gradient_accumulation_steps": 2}, 2)
    problem = error.value.problems[0]
    assert "2 x 2 x 2 = 8, not 12" in problem.why
    for fix in ("train_batch_size to 8", "gradient_accumulation_steps to 3", f"{MICRO} to 3", "ranks to 3"):
        assert fix in problem.fix
    for wrong in ({}, {"train_batch_size": 7}, {MICRO: 0}, {MICRO: "auto"}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(ConfigError):
            settle(wrong, 2)


def test_features_and_keys() -> None:
    with pytest.raises(ConfigError) as error:
        settle({MICRO: 1, "zero_optimization": {"stage": 2, "overlap_com": True}}, 1)
    assert error.value.problems[0].fix == "write zero_optimization.overlap_comm"
    with pytest.raises(NotOffered, match="progressive_layer_drop"):
        settle({MICRO: 1, "progressive_layer_drop": {"enabled": True}}, 1)
    with pytest.raises(ConfigError, match="nvme_path"):
        settle({MICRO: 1, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, 1)
    with pytest.raises(NotOffered, match="zero_hpz_partition_size"):
        settle({MICRO: 1, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, 1)
    found = settle({MICRO: 1, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}, 1)
    assert found.config.strategy.zero_stage == 3
    half = settle({MICRO: 1, "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 2}}, 1)
    scaler = scaler_of(half)
    assert scaler is not None and scaler.scale == 16.0 and scaler.window == 1000
    scaler.update(overflow=True)
    assert scaler.scale == 16.0  # hysteresis
    scaler.update(overflow=True)
    assert scaler.scale == 8.0 and scaler.num_skipped == 2
    fixed = scaler_of(settle({MICRO: 1, "fp16": {"enabled": True, "loss_scale": 128}}, 1))
    assert fixed is not None
    fixed.update(overflow=True)
    assert fixed.scale == 128.0


def test_optimizers() -> None:
    adam = build_optimizer({"type": "Adam", "params": {"lr": 0.1, "betas": [0.8, 0.9]}}, _params())
    assert type(adam) is torch.optim.AdamW and adam.param_groups[0]["weight_decay"] == 0.0
    coupled = build_optimizer({"type": "Adam", "params": {"adam_w_mode": False}}, _params())
    assert type(coupled) is torch.optim.Adam
    torch_adam = build_optimizer({"type": "AdamW", "params": {"torch_adam": True}}, _params())
    assert torch_adam is not None and torch_adam.param_groups[0]["weight_decay"] == 0.01
    assert type(build_optimizer({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, _params())) is torch.optim.SGD
    assert build_optimizer({}, _params()) is None
    lion = build_optimizer({"type": "Lion", "params": {"lr": 0.1, "weight_decay": 0.5}}, _params())
    assert lion is not None
    param = lion.param_groups[0]["params"][0]
    param.grad = torch.tensor([2.0, -3.0, 0.0])
    lion.step()
    torch.testing.assert_close(param.detach(), torch.tensor([0.85, 1.05, 0.95]))
    for wrong in ({"type": "AdmaW"}, {"type": "AdamW", "params": {"weight_deacy": 0.1}}):
        with pytest.raises(ConfigError):
            build_optimizer(wrong, _params())
    with pytest.raises(ConfigError, match="max_grad_norm"):
        build_optimizer({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, _params())


MUON = {"gram": [-0.2579256, 0.8534594, 1.0053506], "standard": [-0.2601035, 0.8553106, 1.0053506]}


def test_muon_gives_what_deepspeed_gives() -> None:
    """The numbers are those of DeepSpeed 0.19.8's own MuonWithAuxAdam after two steps on the CPU."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4, 2)), *_params()]
    for param, use_muon in zip(params, (True, True, False), strict=True):
        param.use_muon = use_muon  # type: ignore[attr-defined]
    for method, expected in MUON.items():
        values = [param.detach().clone() for param in params]
        settings = {"lr": 0.05, "adam_lr": 0.01, "weight_decay": 0.1, "ns_method": method}
        muon = build_optimizer({"type": "Muon", "params": settings}, params)
        assert muon is not None
        for step in range(2):
            for param in params:
                param.grad = torch.linspace(-1 - step, 1, param.numel()).reshape(param.shape)
            muon.step()
        found = [float(param.detach().flatten()[1]) for param in params]
        assert found == pytest.approx(expected, abs=2e-6 if method == "gram" else 1e-3)
        for param, value in zip(params, values, strict=True):
            param.data = value
    for wrong in ({"momentun": 0.9}, {"ns_method": "grahm"}):
        with pytest.raises(ConfigError):
            build_optimizer({"type": "Muon", "params": wrong}, params)
    with pytest.raises(NotOffered, match="per_head_muon"):
        build_optimizer({"type": "Muon", "params": {"per_head_muon": True}}, params)
    with pytest.raises(UserError, match="1 parameters are not marked"):
        build_optimizer({"type": "Muon"}, _params())


def _rates(kind: str, steps: int, **params: Any) -> list[float]:
    optimizer = torch.optim.AdamW(_params(), lr=0.1)
    schedule = build_schedule({"type": kind, "params": params}, optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_schedules() -> None:
    """The numbers are those that DeepSpeed 0.19.8 gives."""
    log = [0.0, 0.0, 0.1 * math.log(2) / math.log(4), 0.1 * math.log(3) / math.log(4), 0.1, 0.1]
    assert _rates("WarmupLR", 5, warmup_num_steps=4) == pytest.approx(log)
    linear = [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    decay = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_max_lr": 1.0, "warmup_type": "linear"}
    assert _rates("WarmupDecayLR", 8, **decay) == pytest.approx(linear)
    cosine = _rates("WarmupCosineLR", 6, total_num_steps=4, warmup_num_steps=2, warmup_type="linear")
    assert cosine == pytest.approx([0.0, 0.0, 0.05, 0.1 * (0.0001 + 0.9999 * 0.5), 1e-5, 1e-5, 1e-5])
    ranged = _rates("LRRangeTest", 3, lr_range_test_min_lr=0.1, lr_range_test_step_size=2)
    assert ranged == pytest.approx([0.1, 0.15, 0.2, 0.25])
    cycle = {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 2}
    assert _rates("OneCycle", 4, **cycle) == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    optimizer = torch.optim.SGD(_params(), lr=0.1)
    torch_own = build_schedule({"type": "StepLR", "params": {"step_size": 1}}, optimizer)
    assert type(torch_own) is torch.optim.lr_scheduler.StepLR
    with pytest.raises(ConfigError, match="WarmupLr"):
        build_schedule({"type": "WarmupLr"}, torch.optim.SGD(_params(), lr=0.1))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("OneCycle", {"cycle_first_step_size": 3, "cycle_second_step_size": 0}),
        ("OneCycle", {"cycle_first_step_size": 3, "cycle_second_step_size": 5, "cycle_first_stair_count": 2}),
        ("OneCycle", {"cycle_first_step_size": 2, "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}),
        ("OneCycle", {"cycle_first_step_size": 2, "cycle_min_mom": [0.7, 0.8], "cycle_max_mom": (0.9, 0.95)}),
        ("OneCycle", {"cycle_first_step_size": 2, "cycle_momentum": False}),
        ("OneCycle", {"cycle_first_step_size": 2, "cycle_max_lr": [0.1, 0.2, 0.3]}),
        ("OneCycle", {"cycle_first_step_size": 0}),
        ("OneCycle", {"cycle_first_step_size": 1, "cycle_second_step_size": -1}),
        ("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "cubic"}),
        ("WarmupLR", {"warmup_num_steps": 4, "warmup_max_lr": [0.1]}),
        ("WarmupDecayLR", {"warmup_num_steps": 4, "total_num_steps": 3, "warmup_max_lr": [0.1, 0.2]}),
        ("WarmupCosineLR", {"warmup_num_steps": 1, "total_num_steps": 6, "warmup_type": "cubic"}),
        ("LRRangeTest", {"lr_range_test_step_size": 2, "lr_range_test_staircase": True}),
        ("LRRangeTest", {"lr_range_test_step_size": 0}),
    ],
)
def test_schedules_set_what_deepspeeds_own_set(kind: str, params: dict[str, Any], optimizer: str) -> None:
    theirs = getattr(pytest.importorskip("deepspeed.runtime.lr_schedules"), kind)
    cycle = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1} if kind == "OneCycle" else {}
    expected = _set_by(theirs, optimizer, cycle | params)
    ours = _set_by(SCHEDULES[kind], optimizer, cycle | params)
    assert ours == (expected if expected is ValueError else pytest.approx(expected))


def _set_by(schedule_class: Any, kind: str, params: dict[str, Any]) -> Any:
    optimizer = getattr(torch.optim, kind)([{"params": _params()}, {"params": _params(), "lr": 0.3}], lr=0.1)
    try:
        schedule = schedule_class(optimizer, **params)
    except ValueError:
        return ValueError
    rows: list[float] = []
    for step in range(9):
        rows += [value for group in optimizer.param_groups for value in (group["lr"], *group.get("betas", ()))]
        if step == 4:
            optimizer.add_param_group({"params": _params(), "lr": 0.7})
        schedule.step()
    rows += [*schedule.get_last_lr(), *(beta for betas in getattr(schedule, "get_mom", list)() or () for beta in betas)]
    return rows


def test_flags_of_schedules_build_them() -> None:
    flags = importlib.import_module("distui.compat.deepspeed.runtime.lr_schedules")
    parser = flags.add_tuning_arguments(argparse.ArgumentParser())
    given = "--lr_schedule OneCycle --cycle_min_lr 1e-4 --cycle_max_lr 1e-3 --cycle_first_step_size 4"
    section, problem = flags.get_config_from_args(parser.parse_args([*given.split(), "--cycle_first_stair_count", "5"]))
    assert problem is None and section["params"]["cycle_momentum"] is False
    assert "cycle_second_step_size" not in section["params"]  # as the schedule has it
    schedule = build_schedule(section, torch.optim.AdamW(_params()))
    assert (schedule.first_step_size, schedule.second_step_size, schedule.step_ratio) == (4, 4, 0.5)
    assert (schedule.first_stair_count, schedule.second_stair_count) == (5, 5)
    assert flags.get_lr_from_config(section) == (1e-3, "")
    section, _ = flags.get_config_from_args(parser.parse_args(["--lr_schedule", "WarmupCosineLR"]))
    assert set(section["params"]) == {"warmup_num_steps", "warmup_type", "warmup_min_ratio", "cos_min_ratio"}
    assert flags.get_lr_from_config(section)[0] is None
    assert flags.get_config_from_args(parser.parse_args(["--lr_schedule", "Step"]))[0] is None
    uneven = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 10, "cycle_second_step_size": 21}
    stairs = _rates("OneCycle", 30, **uneven, cycle_first_stair_count=10, cycle_second_stair_count=21)
    assert stairs == pytest.approx(_rates("OneCycle", 30, **uneven))


TOP = """
DeepSpeedConfig DeepSpeedConfigError DeepSpeedDataLoader DeepSpeedEngine DeepSpeedHybridEngine DeepSpeedInferenceConfig
DeepSpeedOptimizer DeepSpeedTransformerConfig DeepSpeedTransformerLayer InferenceEngine OnDevice PipelineEngine
PipelineModule __git_branch__ __git_hash__ __version__ add_config_arguments checkpointing comm default_inference_config
dist get_accelerator init_distributed init_inference initialize log_dist logger moe module_inject ops pipe
replace_transformer_layer runtime set_autotp_mode tp_model_init utils zero DeepSpeedOptimizerCallable
DeepSpeedSchedulerCallable KV MLA_KV MLA_Q MUON_OPTIMIZER NOT_HEAD_BLOCKED Optimizer QUERY
TORCH_DISTRIBUTED_DEFAULT_PORT git_branch git_hash load_ds_config merge_tp_model_init_into_config
record_tp_model_init_args resolve_per_head_muon_after_sharding set_optimizer_flags
"""


def test_what_needs_no_axis_of_its_own_is_taken() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    deepspeed.set_autotp_mode(training=True)
    assert deepspeed.tp_model_init(model, tp_size=1, dtype=torch.float32) is model
    with pytest.raises(NotOffered, match="tp_group"):
        deepspeed.tp_model_init(model, tp_size=2, dtype=torch.float32, tp_group=object())
    deepspeed.set_optimizer_flags(type("Config", (), {"optimizer_name": "muon"}), model)
    assert [param.use_muon for param in model.parameters()] == [True, False, True, False]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        config={"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0},
    )
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer)
    from distui.compat.accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper

    before = model[1].bias.item()
    DeepSpeedEngineWrapper(engine).backward(engine(torch.ones(2, 3)).sum() / 2)
    DeepSpeedOptimizerWrapper(optimizer).step()
    assert model[1].bias.item() == pytest.approx(before - 0.5)
    engine.destroy()
    torch.distributed.destroy_process_group()  # of one rank, which initialize has made


def test_every_public_name_is_offered_or_refused_with_the_way_around() -> None:
    for name in TOP.split():
        getattr(deepspeed, name)
    with pytest.raises(NotOffered, match="vLLM"):
        deepspeed.init_inference(torch.nn.Linear(1, 1))
    with pytest.raises(NotOffered, match="use PipelineModule"):
        deepspeed.DualPipeVModule(layers=[])
    with pytest.raises(RuntimeError, match="num_stages or topology"):
        deepspeed.PipelineModule(layers=[])
    with pytest.raises(AttributeError, match=r"docs/coming-from-deepspeed\.md"):
        _ = deepspeed.initialise
    modules = "accelerator checkpointing comm ops.adam ops.lion runtime.lr_schedules runtime.zero utils.groups"
    for module in [*modules.split(), "runtime.activation_checkpointing.checkpointing", "utils.zero_to_fp32"]:
        importlib.import_module(f"distui.compat.deepspeed.{module}")
    paths = "accelerator.real_accelerator:get_accelerator comm.comm:all_reduce ops.adam.cpu_adam:DeepSpeedCPUAdam"
    paths += " ops.adam.fused_adam:FusedAdam ops.lion.fused_lion:FusedLion runtime.zero.stage3:ZeROOptimizer"
    paths += " runtime.zero.muon.muon_optimizer:MuonWithAuxAdam"
    paths += " utils.init_on_device:OnDevice utils.timer:ThroughputTimer"
    for path in paths.split():
        module, name = path.split(":")
        getattr(importlib.import_module(f"distui.compat.deepspeed.{module}"), name)
    kernels = importlib.import_module("distui.compat.deepspeed.ops.transformer")  # imported for one branch of a script
    with pytest.raises(NotOffered, match="use_kernels"):
        kernels.DeepSpeedTransformerLayer(1)
    layer = importlib.import_module("distui.compat.deepspeed.moe.layer")
    with pytest.raises(NotOffered, match="use_tutel"):
        layer.MoE(4, torch.nn.Linear(4, 4), use_tutel=True)
    with pytest.raises(ModuleNotFoundError, match=r"docs/coming-from-deepspeed\.md"):
        importlib.import_module("distui.compat.deepspeed.no_such_module")
    members = "allreduce_gradients was_step_applied get_mom set_train_batch_size no_sync module_state_dict scale"
    assert all(hasattr(deepspeed.DeepSpeedEngine, name) for name in members.split()[1:])


def test_a_pipeline_of_the_jobs_settings_is_refused_for_a_plain_model() -> None:
    refuse_pipeline(StrategySection(tensor_parallel=2), "DeepSpeed's names")
    with pytest.raises(NotOffered, match=r"strategy\.pipeline_parallel=2 under DeepSpeed's names"):
        refuse_pipeline(StrategySection(pipeline_parallel=2), "DeepSpeed's names")
