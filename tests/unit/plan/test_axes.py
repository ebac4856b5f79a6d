"""Context and expert parallelism, compressed gradients and other backends: memory, time, and which can be launched."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distui.core.axes.schedules import course, tables
from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.errors import UserError
from distui.core.hardware.detect import parse_hardware
from distui.core.plan.measured import Measured
from distui.core.plan.memory import Strategy, activation_bytes, footprint, wire_bytes
from distui.core.plan.models import load_model
from distui.core.plan.planned import planned_memory
from distui.core.plan.rates import rates_of
from distui.core.plan.search import BACKENDS, COMPRESSIONS, explain, plan_all
from distui.core.plan.time import step_time

BASE = Strategy(1, "none", "none", "none", 1, 1, 1, 1, 8, "bf16", "fp32", "adamw")
EIGHT = parse_hardware("8xA100-40GB")
RATES = rates_of(EIGHT, "bf16", 8)


def test_context_ranks_share_a_sequence_and_the_states() -> None:
    model = load_model("llama-7b", 8192)
    cut = replace(BASE, data_parallel=2, context_parallel=4, zero_stage=3)
    assert cut.world_size == 8 and cut.num_shards == 8
    whole = replace(BASE, zero_stage=3)
    assert footprint(model, cut, "cuda").model_states == footprint(model, whole, "cuda").model_states
    assert sum(activation_bytes(model, cut, 2)) == pytest.approx(sum(activation_bytes(model, whole, 2)) / 4)
    assert step_time(model, cut, RATES).forward_s == pytest.approx(step_time(model, whole, RATES).forward_s / 4)


@pytest.mark.parametrize(("stages", "micro"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
def test_a_pipelines_bubble_and_memory_are_those_of_its_table(stages: int, micro: int) -> None:
    model = load_model("llama-7b", 2048)
    cut = replace(BASE, data_parallel=8 // stages, pipeline_parallel=stages, accumulation=micro)
    timing, table = step_time(model, cut, RATES), course("1f1b", tables("1f1b", stages, micro))
    assert timing.bubble_s / (timing.bubble_s + timing.forward_s + timing.backward_s) == pytest.approx(table.bubble)
    one, two = (sum(activation_bytes(model, replace(cut, accumulation=m), 2)) for m in (stages, micro))
    assert table.peak == stages and one == two, "more micro-batches are not under way together"
    assert (
        check(Config.model_validate({"strategy": {"pipeline_parallel": stages}, "batch": {"accumulation": micro}}))
        == []
    )


def test_other_schedules_idle_less_and_hold_as_their_tables_say() -> None:
    model = load_model("llama-7b", 2048)
    plain = replace(BASE, data_parallel=2, pipeline_parallel=4, accumulation=8)
    idle, held = {}, {}
    for schedule in ("gpipe", "1f1b", "interleaved", "zbv"):
        cut = replace(plain, pipeline_schedule=schedule)
        timing = step_time(model, cut, RATES)
        idle[schedule] = timing.bubble_s / (timing.bubble_s + timing.forward_s + timing.backward_s)
        held[schedule] = sum(activation_bytes(model, cut, 2))
        assert idle[schedule] == pytest.approx(course(schedule, tables(schedule, 4, 8)).bubble)
    assert idle["zbv"] < idle["1f1b"] / 2 and idle["interleaved"] < 0.6 * idle["1f1b"] and idle["gpipe"] == idle["1f1b"]
    assert held["gpipe"] > held["interleaved"] > held["1f1b"] >= held["zbv"]


def test_a_pipeline_that_has_too_few_micro_batches_is_planned_as_what_does_not_fit() -> None:
    plans = plan_all(load_model("llama-7b", 2048), EIGHT, global_size=8)
    deep = [plan for plan in plans if plan.pipeline_parallel == 8 and plan.data_parallel == 1]
    assert deep and all(plan.accumulation == 8 for plan in deep)
    few = [plan for plan in plan_all(load_model("llama-7b", 2048), EIGHT, global_size=4) if plan.pipeline_parallel == 8]
    assert few and not any(plan.fits for plan in few)
    assert "global_size=4 gives 4 micro-batches a step" in few[0].why and "a pipeline needs 8" in few[0].why


def test_hidden_states_that_are_cut_along_the_sequence_leave_what_is_joined() -> None:
    model = load_model("llama-7b", 2048)
    whole = replace(BASE, data_parallel=4, tensor_parallel=2)
    cut = replace(whole, sequence_parallel=True)
    hidden = 2 * 2048 * model.hidden_size  # bytes of one hidden state in bf16
    saved = sum(activation_bytes(model, whole, 2)) - sum(activation_bytes(model, cut, 2))
    assert saved == pytest.approx(model.num_layers * 2 * hidden / 2)
    inputs = [replace(one, activation_checkpointing="full") for one in (whole, cut)]
    saved = sum(activation_bytes(model, inputs[0], 2)) - sum(activation_bytes(model, inputs[1], 2))
    assert saved == pytest.approx(model.num_layers * hidden / 2 + hidden)


def test_expert_ranks_hold_a_part_of_the_experts_and_shards_stay_equal() -> None:
    model = load_model("mixtral-8x7b")
    assert model.expert_parameters == 32 * 8 * 3 * 4096 * 14336
    for stage in (0, 1, 2, 3):
        alone = footprint(model, replace(BASE, zero_stage=stage), "cuda")
        cut = footprint(model, replace(BASE, zero_stage=stage, expert_parallel=8), "cuda")
        if stage < 3:
            assert alone.parameters - cut.parameters == pytest.approx(2 * model.expert_parameters * 7 / 8, rel=1e-6)
        else:
            assert cut.parameters == alone.parameters, "an expert is sharded over the ranks that hold it"
        if stage >= 1:
            assert cut.optimizer_states == alone.optimizer_states
    # Experts are over EP and the rest over TP; tensor-parallel ranks send a part of the tokens each.
    both = footprint(model, replace(BASE, zero_stage=0, expert_parallel=8, tensor_parallel=2), "cuda")
    rest = model.num_parameters - model.expert_parameters
    assert both.parameters == pytest.approx(2 * (rest / 2 + model.expert_parameters / 8), rel=1e-6)
    timing = step_time(model, replace(BASE, expert_parallel=8), RATES)
    halved = step_time(model, replace(BASE, expert_parallel=8, tensor_parallel=2), RATES)
    assert timing.expert_s / 2 < halved.expert_s < timing.expert_s
    assert timing.expert_s > 0 and step_time(model, BASE, RATES).expert_s == 0


def test_compressed_gradients_travel_in_fewer_bytes_and_one_bit_keeps_its_error() -> None:
    model = load_model("gpt2-xl")
    assert wire_bytes("onebit", 4) < wire_bytes("int8", 4) == wire_bytes("fp8", 4) < wire_bytes("none", 4) == 4
    slow = replace(RATES, intra_bandwidth=1e9)
    plain, packed = (replace(BASE, zero_stage=0, compression=form) for form in ("none", "int8"))
    assert step_time(model, packed, slow).total_s < step_time(model, plain, slow).total_s  # type: ignore[operator]
    extra = footprint(model, replace(plain, compression="onebit"), "cuda").buffers
    assert extra > 8 * model.num_parameters


def test_every_backend_is_planned_in_its_own_stages() -> None:
    model = load_model("gpt2-xl")
    plans = plan_all(model, EIGHT, backends=tuple(BACKENDS), compressions=COMPRESSIONS)
    found = {(plan.backend, plan.zero_stage) for plan in plans}
    assert found == {(backend, stage) for backend, stages in BACKENDS.items() for stage in stages}
    assert len({plan.name for plan in plans}) == len(plans)
    assert {plan.compression for plan in plans} == set(COMPRESSIONS)
    for plan in plans[:: max(1, len(plans) // 50)]:
        terms = {term.name: term.value for term in explain(plan, model, EIGHT)}
        assert terms["memory of a rank"] == plan.memory_per_rank_bytes
        if plan.step_s:
            assert terms["step"] == pytest.approx(plan.step_s)
    with pytest.raises(UserError, match="zero4"):
        plan_all(model, EIGHT, backends=("zero4",))


def test_a_plan_is_available_exactly_where_the_settings_can_be_launched() -> None:
    plans = plan_all(load_model("mixtral-8x7b"), EIGHT, backends=tuple(BACKENDS), compressions=COMPRESSIONS)
    for plan in plans[:: max(1, len(plans) // 60)]:
        problems = check(Config.model_validate(plan.to_config()))
        assert plan.available == all(problem.path == "offload.nvme_path" for problem in problems), plan.name


KEPT = {
    "2": {
        "torch": "2.13.0",
        "measured_s": 0.0,
        "compute": {"fp32": [[256, 128, 1e10], [256, 512, 2e10], [1024, 128, 3e10], [1024, 512, 4e10]]},
        "optimizer_bandwidth": 5e9,
        "collectives": {"all_gather": [1e-3, 1e9], "reduce_scatter": [1e-3, 5e8], "all_reduce": [1e-3, 4e8]},
        "baseline_bytes": 300 << 20,
    }
}


def test_a_calibration_gives_the_rates_between_and_beyond_what_it_measured() -> None:
    measured = Measured.of(KEPT, 2)
    assert measured is not None and Measured.of(KEPT, 4) is None and Measured.of({"2": {"torch": "1"}}, 2) is None
    assert measured.rate("fp32", 256, 128) == 1e10
    assert measured.rate("fp32", 8192, 1 << 20) == 4e10
    between = measured.rate("fp32", 512, 256)
    assert between is not None and 1e10 < between < 4e10
    assert measured.rate("bf16", 256, 128) is None


def test_a_calibrated_plan_uses_the_measured_rates_and_says_so() -> None:
    from distui.core.hardware.detect import Cpu, Hardware

    cpu = Cpu("test", 2, 2, 2)
    hardware = Hardware("test", 1, (), cpu, 64 << 30, 64 << 30, calibration=KEPT)
    model = load_model("gpt2", 128)
    plans = plan_all(model, hardware, nproc=2, dtype="fp32", micro_size=1)
    assert all(plan.memory["framework"] == 300 << 20 for plan in plans)
    ddp = next(plan for plan in plans if plan.name == "DDP")
    assert ddp.step_s is not None
    terms = {term.name: term for term in explain(ddp, model, hardware)}
    assert "distui plan --calibrate" in terms["achieved compute rate"].source
    assert terms["all_reduce: beta"].value == 4e8
    other = plan_all(model, replace(hardware, calibration={}), nproc=2, dtype="fp32", micro_size=1)
    assert all(plan.step_s is None and "--calibrate" in plan.why for plan in other)


def test_what_a_launch_plans_for_its_ranks() -> None:
    model = load_model("gpt2")
    config = Config.model_validate({"strategy": {"zero_stage": 2}, "batch": {"global_size": 8, "micro_size": 2}})
    planned = planned_memory(config, model, EIGHT, 4)
    assert planned["parameters"] == 4 * model.num_parameters
    assert planned["optimizer_states"] == pytest.approx(2 * model.num_parameters, abs=4)
    assert planned["activations"] > 0
    unknown = planned_memory(Config.model_validate({"strategy": {"zero_stage": 2}}), model, EIGHT, 4)
    assert "activations" not in unknown and unknown["parameters"] == planned["parameters"]


def test_groups_in_a_node_hold_a_copy_each_and_send_less_between_nodes() -> None:
    model, nodes = load_model("llama-7b", 4096), parse_hardware("4x8xA100-80GB")
    plans = {plan.name: plan for plan in plan_all(model, nodes, global_size=256)}
    whole, groups = plans["ZeRO-3, full checkpointing"], plans["ZeRO-3, groups of 8, full checkpointing"]
    assert (whole.shard_size, groups.shard_size) == (0, 8) and groups.data_parallel == 32
    assert groups.memory["optimizer_states"] == pytest.approx(4 * whole.memory["optimizer_states"], rel=1e-6)
    assert "each of 4 groups of 8 ranks in a node holds a copy of the states" in groups.why
    assert groups.to_config()["strategy"]["shard_size"] == 8 and groups.available
    assert not any(plan.shard_size for plan in plan_all(model, EIGHT))
    rates = rates_of(nodes, "bf16", 8)
    three = replace(BASE, zero_stage=3, data_parallel=32, accumulation=8)
    apart, together = (step_time(model, replace(three, shard_size=size), rates) for size in (8, 0))
    assert apart.exposed_s + apart.hidden_s < 0.7 * (together.exposed_s + together.hidden_s)
    terms = explain(groups, model, nodes)
    assert any("over 4 copies" in term.formula for term in terms)


def test_tiles_bound_the_logits_and_the_inside_of_feed_forwards() -> None:
    model = load_model("llama-3-8b", 65_536)
    full = replace(BASE, activation_checkpointing="full")
    tiled = replace(full, loss_tile=2048, mlp_tile=2048)
    (_, whole), (kept, few) = activation_bytes(model, full, 2), activation_bytes(model, tiled, 2)
    assert few == whole / 32 and kept < activation_bytes(model, full, 2)[0]
    two = activation_bytes(model, replace(full, tensor_parallel=2), 2)
    assert two[1] == whole / 2, "each rank has its part of the vocabulary"
    config = Config.model_validate({"activation_checkpointing": {"loss_tile": 2048}, "batch": {"micro_size": 1}})
    plain = Config.model_validate({"batch": {"micro_size": 1}})
    assert (
        planned_memory(config, model, EIGHT, 8)["activations"] < planned_memory(plain, model, EIGHT, 8)["activations"]
    )
