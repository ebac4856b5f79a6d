"""Ranking: what fits, how fast, why the others do not, and what would make them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.errors import UserError
from distui.core.hardware.detect import GIB, Cpu, Disk, Gpu, Hardware, parse_hardware
from distui.core.plan.distinct import beats, distinct
from distui.core.plan.models import load_model
from distui.core.plan.rates import HOST_STEP_BANDWIDTH
from distui.core.plan.search import default_dtype, explain, plan_all
from distui.core.plan.shapes import gpt
from distui.core.plan.types import Plan

JSON_KEYS = [
    "name",
    "backend",
    "zero_stage",
    "offload",
    "tensor_parallel",
    "pipeline_parallel",
    "activation_checkpointing",
    "micro_size",
    "fits",
    "memory_per_rank_bytes",
    "tokens_per_s",
    "why",
]

LLAMA = load_model("llama-7b")
EIGHT_A100 = parse_hardware("8xA100-40GB")


def cpu_machine(ranks: int = 2, gib: float = 16, **facts: object) -> Hardware:
    cpu = Cpu("cpu", num_cores_physical=2 * ranks, num_cores_logical=2 * ranks, num_cores_usable=2 * ranks)
    values: dict[str, object] = {"memory_total_bytes": int(gib * GIB), "memory_available_bytes": int(gib * GIB)}
    return Hardware(name="cpu", nodes=1, gpus_per_node=(), cpu=cpu, **(values | facts))  # type: ignore[arg-type]


def measured_machine(ranks: int = 2) -> Hardware:
    found = cpu_machine(ranks, rank_bandwidth=1e9)
    assert found.cpu is not None
    return replace(found, cpu=replace(found.cpu, peak_flops={"fp32": 1e11}, memory_bandwidth=2e10))


def named(plans: list[Plan], name: str) -> Plan:
    return next(plan for plan in plans if plan.name == name)


# ---- the published table


def test_llama_7b_on_eight_a100_as_published() -> None:
    plans = plan_all(LLAMA, EIGHT_A100, micro_size=1, reduce_dtype="same", available_only=True)
    ddp, two, three = (named(plans, name) for name in ("DDP", "ZeRO-2", "ZeRO-3"))
    assert not ddp.fits and two.fits and three.fits
    assert three.memory_per_rank_bytes < two.memory_per_rank_bytes < ddp.memory_per_rank_bytes
    assert two.tokens_per_s is not None and three.tokens_per_s is not None
    assert 0.85 * two.tokens_per_s < three.tokens_per_s < two.tokens_per_s


def test_with_checkpointing_the_published_gigabytes_are_near() -> None:
    # 32 GB for ZeRO-2 and 18 GB for ZeRO-3, GB as 2**30 like nvidia-smi's; full checkpointing, gradients in bf16.
    plans = plan_all(LLAMA, EIGHT_A100, micro_size=2, reduce_dtype="same")
    two = named(plans, "ZeRO-2, full checkpointing").memory_per_rank_bytes / GIB
    three = named(plans, "ZeRO-3, full checkpointing").memory_per_rank_bytes / GIB
    assert two == pytest.approx(32, rel=0.15)
    assert three == pytest.approx(18, rel=0.15)


def test_gpt_j_does_not_fit_under_ddp_whatever_the_published_table_says() -> None:
    plan = named(plan_all(load_model("gpt-j-6b"), EIGHT_A100, micro_size=1, reduce_dtype="same"), "DDP")
    assert not plan.fits
    states = sum(plan.memory[key] for key in ("parameters", "gradients", "optimizer_states"))
    assert states / 1e9 == pytest.approx(96.8, abs=0.1)


# ---- why


def test_a_misfit_says_how_much_of_how_much_and_of_what() -> None:
    ddp = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "DDP")
    match = re.search(
        r"needs ([\d.]+) of ([\d.]+) GiB, of which 8% .* are kept free: model states ([\d.]+), activations ([\d.]+)",
        ddp.why,
    )
    assert match is not None, ddp.why
    assert float(match[1]) == pytest.approx(ddp.memory_per_rank_bytes / GIB, abs=0.06)
    assert float(match[2]) == 39.4
    assert float(match[3]) == pytest.approx(18 * LLAMA.num_parameters / GIB, abs=0.06)


def test_the_smallest_change_makes_it_fit() -> None:
    plans = plan_all(LLAMA, EIGHT_A100, micro_size=1)
    ddp = named(plans, "DDP")
    assert ddp.smallest_change.startswith("ZeRO-3"), ddp.smallest_change
    assert named(plans, "ZeRO-3").fits
    assert ddp.smallest_change in ddp.why


def test_advice_names_checkpointing_before_a_higher_stage() -> None:
    two = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "ZeRO-2")
    assert "checkpointing" in two.smallest_change and "ZeRO-3" not in two.smallest_change


def test_more_ranks_are_advised_when_nothing_smaller_helps() -> None:
    plan = named(plan_all(load_model("llama-65b"), EIGHT_A100, micro_size=1), "ZeRO-3, full checkpointing")
    match = re.fullmatch(r"(\d+) ranks instead of 8 .*", plan.smallest_change)
    assert match is not None, plan.smallest_change
    ranks = int(match[1])

    def fits(count: int) -> bool:
        wider = replace(EIGHT_A100, gpus_per_node=EIGHT_A100.gpus_per_node[:1] * count)
        plans = plan_all(load_model("llama-65b"), wider, micro_size=1)
        return named(plans, "ZeRO-3, full checkpointing").fits

    assert fits(ranks) and not fits(ranks - 1)


def test_what_fits_only_without_the_margin_says_so() -> None:
    plan = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "ZeRO-2")
    assert not plan.fits and "8%" in plan.why and "kept free" in plan.why
    assert named(plan_all(LLAMA, EIGHT_A100, micro_size=1, margin=0.0), "ZeRO-2").fits


def test_host_memory_that_is_too_small_is_a_misfit() -> None:
    small = parse_hardware("8xA100-40GB", host_memory_bytes=32 * GIB)
    plan = named(plan_all(LLAMA, small, micro_size=1), "ZeRO-2, optimizer on cpu")
    assert not plan.fits and "host memory a node" in plan.why
    large = parse_hardware("8xA100-40GB", host_memory_bytes=512 * GIB)
    assert named(plan_all(LLAMA, large, micro_size=1), "ZeRO-2, optimizer on cpu").fits
    unknown = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "ZeRO-2, optimizer on cpu")
    assert unknown.fits and "not known" in unknown.why


def test_what_cannot_run_yet_is_flagged_and_can_be_left_out() -> None:
    plans = plan_all(LLAMA, EIGHT_A100)
    assert {plan.available for plan in plans} == {True, False}
    assert all("not available" in plan.why for plan in plans if not plan.available)
    runnable = plan_all(LLAMA, EIGHT_A100, available_only=True)
    assert runnable and all(plan.available for plan in runnable)
    for plan in runnable:
        problems = check(Config.model_validate(plan.to_config()), world_size=plan.world_size)
        assert not [problem for problem in problems if "not available" in problem.what]


# ---- unknown rates


def test_without_a_measured_cpu_the_speed_is_not_known() -> None:
    plans = plan_all(load_model("gpt2"), cpu_machine(), sequence_length=128)
    assert plans and all(plan.tokens_per_s is None and plan.step_s is None for plan in plans)
    assert all("tokens/s n/a" in plan.why for plan in plans)
    assert plans[0].fits and plans[0].name == "DDP", "no recomputation, least communication first"


def test_a_measured_cpu_gives_a_speed_that_follows_the_rate() -> None:
    hardware = measured_machine()
    first = plan_all(load_model("gpt2"), hardware, sequence_length=128, micro_size=4)[0]
    assert first.tokens_per_s is not None
    assert hardware.cpu is not None
    faster = replace(hardware, cpu=replace(hardware.cpu, peak_flops={"fp32": 4e11}))
    second = plan_all(load_model("gpt2"), faster, sequence_length=128, micro_size=4)[0]
    assert second.tokens_per_s is not None and first.tokens_per_s < second.tokens_per_s < 4 * first.tokens_per_s


def test_the_missing_measurement_is_named() -> None:
    hardware = replace(measured_machine(), rank_bandwidth=None)
    plan = plan_all(load_model("gpt2"), hardware, sequence_length=128)[0]
    assert "plan --calibrate" in plan.why
    one = plan_all(load_model("gpt2"), hardware, sequence_length=128, nproc=1)[0]
    assert one.tokens_per_s is not None, "one rank needs no bandwidth"


def test_an_unknown_gpu_has_memory_but_no_speed() -> None:
    gpus = tuple(Gpu(index, "Secret GPU", 48 * GIB, compute_capability=(9, 0)) for index in range(2))
    plan = plan_all(load_model("gpt2"), replace(cpu_machine(), gpus_per_node=gpus))[0]
    assert plan.fits and plan.tokens_per_s is None and plan.precision == "bf16"


def test_a_measured_nvme_disk_gives_offload_a_speed() -> None:
    without = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "ZeRO-3, optimizer on nvme")
    assert without.tokens_per_s is None and "doctor --disk" in without.why
    disk = Disk("/nvme", 4096 * GIB, is_nvme=True, read_rate=6e9, write_rate=3e9)
    within = named(plan_all(LLAMA, replace(EIGHT_A100, disks=(disk,)), micro_size=1), "ZeRO-3, optimizer on nvme")
    assert within.step_s is not None and within.step_s > 12 * LLAMA.num_parameters / 3e9
    on_cpu = named(plan_all(LLAMA, EIGHT_A100, micro_size=1), "ZeRO-3, optimizer on cpu")
    assert on_cpu.step_s is not None and on_cpu.step_s < within.step_s
    # The update runs on the host, whose memory all ranks share: 30 bytes a parameter (28, and the 16-bit copy).
    update = next(term for term in explain(on_cpu, LLAMA, EIGHT_A100) if term.name == "optimizer")
    assert update.value == pytest.approx((2 * 12 + 4 + 2) * LLAMA.num_parameters / HOST_STEP_BANDWIDTH)


def test_one_gpu_trains_more_when_gradients_leave_it_too() -> None:
    card = parse_hardware("1xA100-40GB", host_memory_bytes=256 * GIB)
    plans = plan_all(LLAMA, card, micro_size=1)
    stage_2 = named(plans, "ZeRO-2, optimizer on cpu, full checkpointing")
    assert stage_2.fits, stage_2.why
    assert not named(plans, "ZeRO-1, optimizer on cpu, full checkpointing").fits, "4 bytes of gradient are too many"


# ---- batches, goals, choices


def test_a_global_batch_is_kept_exactly() -> None:
    for plan in plan_all(LLAMA, EIGHT_A100, global_size=96):
        if plan.fits:
            assert plan.micro_size * plan.accumulation * plan.data_parallel == 96 == plan.global_size


def test_a_global_batch_that_cannot_be_divided_says_so() -> None:
    plan = named(plan_all(LLAMA, EIGHT_A100, global_size=12), "ZeRO-3")
    assert not plan.fits and "global_size=12 is not a multiple of 8" in plan.why


def test_goals_order_the_plans() -> None:
    speed = [plan for plan in plan_all(LLAMA, EIGHT_A100) if plan.fits and plan.tokens_per_s]
    assert [plan.tokens_per_s for plan in speed] == sorted((plan.tokens_per_s or 0 for plan in speed), reverse=True)
    memory = [plan.memory_per_rank_bytes for plan in plan_all(LLAMA, EIGHT_A100, goal="memory") if plan.fits]
    assert memory == sorted(memory)
    cost = plan_all(load_model("gpt2"), EIGHT_A100, goal="cost", available_only=True)
    assert {plan.world_size for plan in cost} == {1, 2, 4, 8}
    per_gpu = [plan.tokens_per_s / plan.world_size for plan in cost if plan.tokens_per_s]
    assert per_gpu == sorted(per_gpu, reverse=True)
    assert len({plan.name for plan in cost}) == len(cost)


def test_plans_that_a_simpler_one_beats_are_not_worth_a_line() -> None:
    fitting = [plan for plan in plan_all(load_model("llama-3.1-405b"), parse_hardware("1250x8xH100-80GB")) if plan.fits]
    found = distinct(fitting)
    assert found[0] is fitting[0] and len(found) < len(fitting) / 2
    for plan in fitting:
        if plan not in found:
            assert any(beats(other, plan) for other in found), plan.name
    # Less memory is a reason of its own.
    leanest = min(fitting, key=lambda plan: plan.memory_per_rank_bytes)
    assert min(plan.memory_per_rank_bytes for plan in found) <= 1.02 * leanest.memory_per_rank_bytes


def test_advice_leaves_out_a_compression_that_forbids_stages() -> None:
    plans = plan_all(LLAMA, EIGHT_A100, micro_size=1, compressions=("onebit",))
    changes = {plan.smallest_change.split(" (")[0] for plan in plans if plan.compression == "onebit" and not plan.fits}
    assert "ZeRO-3, gradients not compressed" in changes
    assert not any("cpu" in change for change in changes)


def test_fitting_plans_come_first_and_names_are_unique() -> None:
    plans = plan_all(LLAMA, parse_hardware("2x8xA100-80GB"))
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    assert len({plan.name for plan in plans}) == len(plans)


def test_formats_follow_the_hardware() -> None:
    assert default_dtype(EIGHT_A100) == "bf16"
    assert default_dtype(parse_hardware("8xV100-32GB")) == "fp16"
    assert default_dtype(cpu_machine()) == "fp32"


def test_slower_links_cost_sharded_parameters_most() -> None:
    def speed(machine: str, name: str) -> float:
        plans = plan_all(load_model("gpt-j-6b"), parse_hardware(machine), micro_size=1, available_only=True)
        found = named(plans, name).tokens_per_s
        assert found is not None
        return found

    nvlink = speed("8xA100-40GB", "ZeRO-3") / speed("8xA100-40GB", "ZeRO-2")
    pcie = speed("8xA100-PCIe-40GB", "ZeRO-3") / speed("8xA100-PCIe-40GB", "ZeRO-2")
    assert pcie < nvlink < 1


def test_a_cluster_of_ten_thousand_gpus_is_planned() -> None:
    plans = plan_all(load_model("llama-3.1-405b"), parse_hardware("1250x8xH100-80GB"), micro_size=1)
    assert plans[0].fits and plans[0].world_size == 10_000


@pytest.mark.parametrize(
    "options",
    [{"nproc": 9}, {"global_size": 0}, {"micro_size": -1}, {"dtype": "fp8"}, {"optimizer": "shampoo"}, {"margin": 1.5}],
)
def test_an_impossible_option_is_the_users_mistake(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        plan_all(LLAMA, EIGHT_A100, **options)  # type: ignore[arg-type]


# ---- the contract


def test_json_has_exactly_the_contracts_keys() -> None:
    for plan in plan_all(LLAMA, EIGHT_A100):
        assert list(plan.as_json()) == JSON_KEYS


def test_terms_add_up_and_every_number_has_a_formula_or_a_source() -> None:
    for plan in plan_all(LLAMA, EIGHT_A100)[:40]:
        terms = {term.name: term for term in explain(plan, LLAMA, EIGHT_A100)}
        assert terms["memory of a rank"].value == plan.memory_per_rank_bytes
        assert sum(terms[key].value for key in plan.memory) == plan.memory_per_rank_bytes
        assert all(term.formula or term.source for term in terms.values())
        if plan.step_s is not None:
            assert terms["step"].value == plan.step_s
            parts = [term.value for term in terms.values() if term.unit == "s" and term.name not in NOT_IN_THE_STEP]
            assert sum(parts) == pytest.approx(plan.step_s)


NOT_IN_THE_STEP = ("step", "hidden communication", "latency of a collective")


@settings(max_examples=60)
@given(
    model=st.sampled_from(["gpt2", "gpt-j-6b", "llama-13b", "mixtral-8x7b", "qwen2.5-0.5b", "350M", "30B"]),
    hardware=st.sampled_from(["1xRTX4090", "3xT4", "8xA100-40GB", "2x8xH100-80GB", "cpu", "measured"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "global_size": st.integers(1, 300),
            "micro_size": st.integers(1, 9),
            "sequence_length": st.integers(1, 9000),
            "dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
            "reduce_dtype": st.sampled_from(["fp32", "same"]),
            "optimizer": st.sampled_from(["adamw", "sgd", "lion", "adafactor"]),
            "goal": st.sampled_from(["throughput", "memory", "cost"]),
        },
    ),
)
def test_every_plan_is_sound(model: str, hardware: str, options: dict[str, object]) -> None:
    machine = {"cpu": cpu_machine(3), "measured": measured_machine(2)}.get(hardware) or parse_hardware(hardware)
    shapes = load_model(model)
    plans = plan_all(shapes, machine, **options)  # type: ignore[arg-type]
    assert plans
    for plan in plans:
        assert plan.why.strip()
        assert plan.fits or "needs" in plan.why or "not a multiple" in plan.why
        assert sum(plan.memory.values()) == plan.memory_per_rank_bytes > 0
        assert plan.tokens_per_s is None or plan.tokens_per_s > 0
        cut = plan.tensor_parallel * plan.pipeline_parallel * plan.context_parallel
        assert plan.world_size == cut * plan.data_parallel
        assert not shapes.num_heads // plan.tensor_parallel % plan.context_parallel
        assert plan.world_size // plan.pipeline_parallel % plan.expert_parallel == 0
        Config.model_validate(plan.to_config())
        if plan.fits:
            assert plan.memory_limit_bytes is not None
            assert plan.memory_per_rank_bytes <= plan.memory_limit_bytes * 0.92


def test_a_model_given_by_its_shapes_is_planned_like_a_preset() -> None:
    byte_gpt = gpt("byte-gpt", num_layers=4, hidden_size=128, num_heads=4, vocab_size=256, sequence_length=128)
    plans = plan_all(byte_gpt, cpu_machine(2), available_only=True)
    assert {plan.zero_stage for plan in plans} == {0, 1, 2, 3}
    assert all(plan.fits for plan in plans)
