"""Memory of a rank: the ZeRO table, activations, the engine's buffers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distui.core.config.schema import Config
from distui.core.hardware.detect import parse_hardware
from distui.core.plan.memory import (
    OPTIMIZER_STATE_BYTES,
    Strategy,
    activation_bytes,
    activation_elements,
    footprint,
    transient_buffers,
)
from distui.core.plan.models import load_model
from distui.core.plan.planned import plan_of
from distui.core.plan.search import plan_all
from distui.core.plan.shapes import gpt

STRATEGY = Strategy(
    zero_stage=0,
    optimizer_home="none",
    params_home="none",
    activation_checkpointing="none",
    micro_size=1,
    accumulation=1,
    tensor_parallel=1,
    pipeline_parallel=1,
    data_parallel=8,
    dtype="bf16",
    reduce_dtype="same",
    optimizer="adamw",
)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("stage", "per_parameter"),
    [
        (0, lambda n: 2 + 2 + 12),
        (1, lambda n: 4 + 12 / n),
        (2, lambda n: 2 + 14 / n),
        (3, lambda n: 16 / n),
    ],
)
def test_model_states_are_the_zero_table(stage: int, per_parameter, n: int) -> None:
    model = load_model("llama-7b")
    memory = footprint(model, replace(STRATEGY, zero_stage=stage, data_parallel=n), "cuda")
    assert memory.model_states == pytest.approx(per_parameter(n) * model.num_parameters, rel=1e-9)


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 16.0), (1, 8 + 8 / 4), (2, 4 + 12 / 4), (3, 16 / 4)])
def test_model_states_in_fp32(stage: int, per_parameter: float) -> None:
    model = load_model("gpt2")
    strategy = replace(STRATEGY, zero_stage=stage, dtype="fp32", reduce_dtype="fp32", data_parallel=4)
    memory = footprint(model, strategy, "cpu")
    assert memory.model_states == pytest.approx(per_parameter * model.num_parameters, rel=1e-9)


def test_summing_gradients_in_fp32_costs_two_more_bytes_where_they_are() -> None:
    model = load_model("gpt2")
    for stage, divisor in ((0, 1), (1, 1), (2, 8), (3, 8)):
        same = footprint(model, replace(STRATEGY, zero_stage=stage), "cuda")
        wide = footprint(model, replace(STRATEGY, zero_stage=stage, reduce_dtype="fp32"), "cuda")
        assert wide.gradients - same.gradients == pytest.approx(2 * model.num_parameters / divisor, abs=2)


def test_activations_of_gpt2_are_32_bytes_a_token_and_width_in_each_layer() -> None:
    model = load_model("gpt2")
    assert 2 * activation_elements(model) == 32 * model.hidden_size


def test_activations_of_llama_count_the_gated_feed_forward_and_shared_keys() -> None:
    seven = load_model("llama-7b")
    assert activation_elements(seven) == 8 * 4096 + 4 * 11008
    eight = load_model("llama-3-8b")
    assert activation_elements(eight) == 4 * 4096 + (2 * 32 + 2 * 8) * 128 + 4 * 14336


def test_full_checkpointing_keeps_a_layers_input_and_one_layer() -> None:
    model = load_model("gpt2-xl")
    none, logits = activation_bytes(model, STRATEGY, 2)
    full, same_logits = activation_bytes(model, replace(STRATEGY, activation_checkpointing="full"), 2)
    selective, _ = activation_bytes(model, replace(STRATEGY, activation_checkpointing="selective"), 2)
    token = 2 * model.sequence_length * model.hidden_size
    assert none - full == token * (48 * 16 - 48 - 16)
    assert full < selective < none
    assert logits == same_logits == 3 * 2 * model.sequence_length * model.vocab_size


def test_buffers_of_each_stage() -> None:
    def buffers(stage: int, n: int = 8, kind: str = "cuda") -> float:
        return transient_buffers(replace(STRATEGY, zero_stage=stage, data_parallel=n), 2, 4, 12, 100, 30, 12, kind)

    assert buffers(0) == buffers(1) == 0
    assert buffers(2) == 4 * (2 * 100 + 30)
    assert buffers(3) == (2 + 4) * (2 * 100 + 30)
    assert buffers(3, n=1) == 0, "one rank shards nothing"
    assert buffers(1, n=4, kind="cpu") == 4 * 230 * 3 / 4, "gloo receives each peer's part"


def test_blocks_below_the_engines_least_unit_are_joined() -> None:
    tiny = gpt("tiny", num_layers=6, hidden_size=64, num_heads=4, vocab_size=256, sequence_length=64)
    assert tiny.block_parameters < 1 << 21
    memory = footprint(tiny, replace(STRATEGY, zero_stage=3, dtype="fp32", reduce_dtype="fp32"), "cuda")
    joined = tiny.block_parameters * min(6, (1 << 21) // tiny.block_parameters)
    assert memory.buffers == 8 * (2 * joined + tiny.root_parameters)


def test_offloaded_states_leave_the_device_and_arrive_elsewhere() -> None:
    model = load_model("llama-7b")
    strategy = replace(STRATEGY, zero_stage=3, optimizer_home="cpu", params_home="nvme")
    memory = footprint(model, strategy, "cuda")
    assert memory.optimizer_states == memory.parameters == memory.gradients == 0
    assert memory.host == pytest.approx((12 + 2) * model.num_parameters / 8, abs=1), "gradients go with the optimizer"
    kept = footprint(model, replace(strategy, zero_stage=1, params_home="none"), "cuda")
    assert kept.gradients == 2 * model.num_parameters, "at stage 1 they stay"
    assert memory.nvme == pytest.approx(2 * model.num_parameters / 8, abs=1)


def test_categories_add_up_to_the_total() -> None:
    memory = footprint(load_model("gpt2"), replace(STRATEGY, zero_stage=3), "cuda")
    assert sum(memory.by_category().values()) == memory.total


relaxed = settings(max_examples=60)

any_strategy = st.builds(
    Strategy,
    zero_stage=st.integers(0, 3),
    optimizer_home=st.just("none"),
    params_home=st.just("none"),
    activation_checkpointing=st.sampled_from(["none", "selective", "full"]),
    micro_size=st.integers(1, 8),
    accumulation=st.integers(1, 8),
    tensor_parallel=st.sampled_from([1, 2, 4]),
    pipeline_parallel=st.just(1),
    data_parallel=st.integers(1, 512),
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    reduce_dtype=st.sampled_from(["fp32", "same"]),
    optimizer=st.sampled_from(sorted(OPTIMIZER_STATE_BYTES)),
)
any_model = st.sampled_from(["gpt2", "gpt-j-6b", "llama-7b", "llama-3-8b", "mixtral-8x7b", "qwen3-30b-a3b"]).map(
    load_model
)


@relaxed
@given(any_model, any_strategy)
def test_states_never_grow_with_the_stage_or_the_ranks(model, strategy) -> None:
    states = [footprint(model, replace(strategy, zero_stage=stage), "cuda").model_states for stage in range(4)]
    assert all(low <= high + 3 for high, low in itertools.pairwise(states))
    twice = footprint(model, replace(strategy, data_parallel=2 * strategy.data_parallel), "cuda")
    assert twice.model_states <= footprint(model, strategy, "cuda").model_states + 3


@relaxed
@given(any_model, any_strategy)
def test_total_memory_falls_with_tensor_parallel_and_grows_with_the_batch(model, strategy) -> None:
    memory = footprint(model, strategy, "cuda")
    larger = footprint(model, replace(strategy, micro_size=strategy.micro_size + 1), "cuda")
    assert larger.activations + larger.logits > memory.activations + memory.logits
    if strategy.world_size > 1:
        cut = footprint(model, replace(strategy, tensor_parallel=strategy.tensor_parallel * 2), "cuda")
        assert cut.total < memory.total


def test_8_bit_moments_are_2_bytes_and_a_scale_and_never_offloaded() -> None:
    model = load_model("llama-7b")
    exact = footprint(model, STRATEGY, "cuda").optimizer_states
    eight = footprint(model, replace(STRATEGY, optimizer="adamw_8bit"), "cuda").optimizer_states
    assert (exact - eight) / model.num_parameters == pytest.approx(8 - 2.03125, rel=1e-6)
    hardware = parse_hardware("8xA100-40GB")
    plans = plan_all(model, hardware, optimizer="adamw_8bit")
    assert plans and all(plan.offload == "none" for plan in plans)
    config = Config.model_validate(plans[0].to_config())
    assert config.optimizer.name == "adamw" and config.optimizer.state_bits == 8
    again = plan_of(config, model, hardware, 8)
    assert again is not None and again.memory_per_rank_bytes == plans[0].memory_per_rank_bytes
