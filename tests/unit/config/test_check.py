"""What cannot work together is found before anything starts, all of it, with numbers that work."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distui.core.config.batch import BatchPlan, solve_batch
from distui.core.config.check import check
from distui.core.config.schema import BatchSection, Config
from distui.core.config.settings import load
from distui.core.errors import ConfigError, Problem
from distui.core.hardware.detect import parse_hardware


def config_of(**overrides: str) -> Config:
    return load(None, {key.replace("__", "."): value for key, value in overrides.items()}, {}).config


def found_in(world_size: int | None = None, hardware: str | None = None, **overrides: str) -> list[Problem]:
    return check(config_of(**overrides), parse_hardware(hardware) if hardware else None, world_size)


def test_the_defaults_have_no_problem() -> None:
    assert check(Config()) == []
    assert found_in(world_size=7, strategy__zero_stage="3", precision__dtype="bf16") == []


@pytest.mark.parametrize(
    ("given", "ranks", "plan"),
    [
        ((64, 4, 8), 2, (64, 4, 8)),
        ((64, 4, None), 2, (64, 4, 8)),
        ((64, None, 8), 2, (64, 4, 8)),
        ((None, 4, 8), 2, (64, 4, 8)),
        ((None, 4, None), 3, (12, 4, 1)),
        ((None, None, 5), 3, (None, None, 5)),
        ((64, None, None), 2, (64, None, None)),
        ((None, None, None), 2, (None, None, 1)),
    ],
)
def test_two_sizes_give_the_third(
    given: tuple[int | None, int | None, int | None], ranks: int, plan: tuple[int | None, int | None, int | None]
) -> None:
    batch = BatchSection(global_size=given[0], micro_size=given[1], accumulation=given[2])
    assert solve_batch(batch, ranks) == BatchPlan(*plan)


@pytest.mark.parametrize(
    ("given", "ranks", "why", "fix"),
    [
        ((10, 4, None), 2, "micro_size x data-parallel ranks = 4 x 2 = 8 does not divide 10", "8 or 16"),
        ((3, None, 2), 2, "accumulation x data-parallel ranks = 2 x 2 = 4", "set batch.global_size to 4"),
        ((7, None, None), 2, "(7 = 3 x 2 + 1)", "6 or 8"),
        ((64, 4, 4), 2, "4 x 4 x 2 = 32, not 64", "or set batch.global_size to 32, or batch.accumulation to 8"),
    ],
)
def test_sizes_that_do_not_fit_come_with_the_nearest_that_do(
    given: tuple[int, int | None, int | None], ranks: int, why: str, fix: str
) -> None:
    batch = BatchSection(global_size=given[0], micro_size=given[1], accumulation=given[2])
    with pytest.raises(ConfigError) as caught:
        solve_batch(batch, ranks)
    (problem,) = caught.value.problems
    assert problem.path == "batch.global_size" and why in problem.why and fix in problem.fix
    assert check(Config(batch=batch), world_size=ranks) == [problem]


def test_groups_that_share_states_must_divide_the_ranks_and_share_something() -> None:
    (problem,) = found_in(strategy__shard_size="3", strategy__zero_stage="2", cluster__nproc="4")
    assert "does not divide the 4 data-parallel ranks" in problem.what and "1, 2, 4" in problem.fix
    (problem,) = found_in(strategy__shard_size="2", cluster__nproc="4")
    assert problem.what == "shard_size=2 with zero_stage=0"
    (problem,) = found_in(strategy__shard_size="1", strategy__zero_stage="3", cluster__nproc="4")
    assert "a group of one rank holds all states" in problem.why
    (problem,) = found_in(strategy__shard_size="2", strategy__zero_stage="2", strategy__backend="fsdp2")
    assert problem.what == "shard_size=2 with backend=fsdp2"
    experts: dict[str, Any] = {
        "strategy__shard_size": "2",
        "strategy__zero_stage": "2",
        "strategy__expert_parallel": "4",
    }
    (problem,) = found_in(**experts, cluster__nproc="8")
    assert "does not divide the 2 data-parallel ranks of a shard group" in problem.what
    sizes: dict[str, Any] = {
        "strategy__shard_size": "1",
        "strategy__context_parallel": "2",
        "strategy__zero_stage": "3",
    }
    assert not found_in(**sizes, cluster__nproc="4")
    assert not found_in(strategy__shard_size="2", strategy__zero_stage="1", cluster__nproc="4")


def test_an_unknown_backend_is_told_the_nearest() -> None:
    (problem,) = found_in(strategy__backend="natve")
    assert (problem.path, problem.fix) == ("strategy.backend", "write native")
    assert "native" in problem.why


@pytest.mark.parametrize(
    ("backend", "stage", "fix"),
    [
        ("ddp", 2, "set strategy.zero_stage to 0, or strategy.backend to native or fsdp2 or deepspeed"),
        ("fsdp2", 0, "set strategy.zero_stage to 2 or 3, or strategy.backend to native or ddp or deepspeed"),
        ("fsdp2", 1, "set strategy.zero_stage to 2 or 3, or strategy.backend to native or deepspeed"),
    ],
)
def test_a_stage_that_a_backend_has_not_is_refused(backend: str, stage: int, fix: str) -> None:
    (problem,) = found_in(strategy__backend=backend, strategy__zero_stage=str(stage))
    assert (problem.path, problem.fix) == ("strategy.zero_stage", fix)
    assert problem.what == f"zero_stage={stage} with backend={backend}"


def test_what_only_native_does_is_refused_elsewhere() -> None:
    problems = found_in(
        strategy__backend="ddp", offload__optimizer="cpu", compression__gradients="int8", precision__dtype="bf16",
        precision__reduce_dtype="same",
    )  # fmt: skip
    found = {(problem.path, problem.what) for problem in problems}
    assert ("offload.optimizer", "optimizer=cpu with backend=ddp") in found
    assert ("compression.gradients", "gradients=int8 with backend=ddp") in found
    assert ("precision.reduce_dtype", "reduce_dtype=same with backend=ddp and dtype=bf16") in found
    assert found_in(strategy__backend="ddp") == []
    assert found_in(strategy__backend="fsdp2", strategy__zero_stage="3", precision__dtype="bf16") == []


@pytest.mark.parametrize("installed", [True, False])
def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr("distui.core.config.backends.find_spec", lambda name: object() if installed else None)
    problems = found_in(strategy__backend="deepspeed", strategy__zero_stage="1")
    assert [problem.fix.split(",")[0] for problem in problems] == (
        [] if installed else ['pip install "distui[deepspeed]"']
    )


def test_offload_needs_its_stage() -> None:
    problems = [problem.why for problem in found_in(offload__params="cpu", strategy__zero_stage="2")]
    assert any("only stage 3 shards parameters" in why for why in problems)
    problems = [problem.why for problem in found_in(offload__optimizer="cpu", strategy__zero_stage="0")]
    assert any("only stages 1, 2 and 3" in why for why in problems)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"compression__gradients": "onebit", "strategy__zero_stage": "1"}, "every rank must hold all"),
        ({"compression__gradients": "onebit", "optimizer__name": "sgd"}, "freezes the variance"),
        ({"compression__weights": "int8", "strategy__zero_stage": "2"}, "only stage 3 gathers weights"),
        ({"compression__gradients": "int8", "compression__block_size": "100"}, "powers of two"),
    ],
)
def test_compression_that_cannot_be_right_is_refused(given: dict[str, Any], why: str) -> None:
    (problem,) = found_in(**given)
    assert problem.path.startswith("compression.") and why in problem.why


@pytest.mark.parametrize(("gradients", "stage"), [("onebit", "0"), ("int8", "0"), ("fp8", "2"), ("int8", "3")])
def test_compression_that_works_is_not_refused(gradients: str, stage: str) -> None:
    assert found_in(compression__gradients=gradients, strategy__zero_stage=stage, precision__dtype="fp16") == []


def test_nvme_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    def path_problems(path: str) -> list[Problem]:
        found = found_in(offload__optimizer="nvme", offload__nvme_path=path, strategy__zero_stage="3")
        return [problem for problem in found if problem.path == "offload.nvme_path"]

    assert path_problems(str(tmp_path)) == []
    assert path_problems("")[0].what.startswith("not set")
    assert path_problems(str(tmp_path / "missing"))[0].fix == f"mkdir -p {tmp_path / 'missing'}"
    (tmp_path / "file").touch()
    assert "cannot be a folder" in path_problems(str(tmp_path / "file"))[0].what


def test_checkpoint_folder_is_made_later_but_must_be_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_in(checkpoint__dir=str(tmp_path / "a" / "b")) == []
    (tmp_path / "file").touch()
    (problem,) = found_in(checkpoint__dir=str(tmp_path / "file" / "ckpt"))
    assert problem.path == "checkpoint.dir"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    (problem,) = found_in(checkpoint__dir=str(tmp_path / "a"))
    assert "is not writable" in problem.what and f"uid {os.getuid()}" in problem.why


def test_what_does_not_go_with_tensor_parallelism_is_refused() -> None:
    found = found_in(
        strategy__tensor_parallel="2", compression__gradients="int8", optimizer__state_bits="8", cluster__nproc="4"
    )
    assert [problem.path for problem in found] == ["compression.gradients", "optimizer.state_bits"]
    assert (
        "gradients=int8 with tensor_parallel=2" in found[0].what and "or strategy.tensor_parallel to 1" in found[0].fix
    )
    (problem,) = found_in(strategy__gather_logits="true", activation_checkpointing__loss_tile="64")
    assert problem.path == "strategy.gather_logits" and "loss_tile=64" in problem.what
    (problem,) = found_in(strategy__tensor_plan="blocks.*.up=colwise")
    assert problem.path == "strategy.tensor_plan" and "tensor_parallel=1" in problem.what
    assert not found_in(strategy__tensor_parallel="2", cluster__nproc="4", batch__global_size="6")


def test_what_does_not_go_with_a_pipeline_is_refused() -> None:
    given: dict[str, Any] = {
        "strategy__pipeline_parallel": "2",
        "strategy__pipeline_schedule": "zbv",
        "strategy__tensor_parallel": "2",
        "strategy__context_parallel": "2",
        "strategy__zero_stage": "2",
        "compression__gradients": "onebit",
        "offload__optimizer": "cpu",
        "optimizer__state_bits": "8",
    }
    found = found_in(**given)
    paths = {problem.path for problem in found}
    assert "strategy.pipeline_schedule" in paths and "strategy.context_parallel" not in paths
    assert {"compression.gradients", "offload.optimizer", "optimizer.state_bits"} < paths
    for backend in ("ddp", "fsdp2", "deepspeed"):
        stage = "0" if backend == "ddp" else "3"
        found = found_in(strategy__backend=backend, strategy__pipeline_parallel="2", strategy__zero_stage=stage)
        assert f"pipeline_parallel=2 with backend={backend}" in [problem.what for problem in found]
    (problem,) = found_in(4, strategy__pipeline_parallel="4", batch__accumulation="3")
    assert problem.what == "accumulation=3 with pipeline_parallel=4"
    assert "3 micro-batches a step, 1 of 4 stages" in problem.why
    assert problem.fix == "set batch.accumulation to 4 or more; 16 leave 16% of the time unused, 4 43%"
    assert not found_in(4, strategy__pipeline_parallel="4", batch__accumulation="4", strategy__zero_stage="3")
    interleaved = {"strategy__pipeline_parallel": "4", "strategy__pipeline_schedule": "interleaved"}
    (problem,) = found_in(4, **interleaved, batch__accumulation="6")
    assert "in rounds of 4, and 6 are 1 of them and 2 more" in problem.why
    assert problem.fix == "set batch.accumulation to 8, or strategy.pipeline_schedule to 1f1b"
    assert not found_in(4, **interleaved, batch__accumulation="8", strategy__zero_stage="3")


def test_the_sequence_is_cut_over_tensor_parallel_ranks_outside_of_pipelines() -> None:
    assert not found_in(4, strategy__sequence_parallel="true", strategy__tensor_parallel="2")
    (problem,) = found_in(4, strategy__sequence_parallel="true")
    assert problem.what == "sequence_parallel=true with tensor_parallel=1"
    pipeline = {"strategy__pipeline_parallel": "2", "batch__accumulation": "2", "strategy__tensor_parallel": "2"}
    (problem,) = found_in(4, strategy__sequence_parallel="true", **pipeline)
    assert problem.what == "sequence_parallel=true with pipeline_parallel=2"


def test_what_does_not_go_with_experts_over_ranks_is_refused() -> None:
    given: dict[str, Any] = {
        "strategy__expert_parallel": "2",
        "compression__weights": "int8",
        "optimizer__state_bits": "8",
    }
    found = {problem.path: problem.what for problem in found_in(8, **given)}
    assert found["optimizer.state_bits"] == "state_bits=8 with expert_parallel=2"
    assert "weights=int8 with expert_parallel=2" in found["compression.weights"]
    (problem,) = found_in(6, strategy__expert_parallel="4")
    assert problem.what == "expert_parallel=4 does not divide the 6 data-parallel ranks"
    assert problem.fix == "set strategy.expert_parallel to one of 1, 2, 3, 6"
    (problem,) = found_in(12, strategy__expert_parallel="8", strategy__tensor_parallel="2")
    assert problem.what == "expert_parallel=8 does not divide the 12 data x tensor-parallel ranks"
    assert not found_in(8, strategy__expert_parallel="4", strategy__tensor_parallel="2", strategy__zero_stage="3")
    assert not found_in(4, strategy__expert_parallel="4", strategy__context_parallel="2", strategy__zero_stage="3")
    (problem,) = found_in(4, strategy__expert_parallel="2", strategy__backend="ddp")
    assert problem.what == "expert_parallel=2 with backend=ddp"


def test_parallel_axes_must_divide_the_ranks() -> None:
    problems = found_in(
        strategy__tensor_parallel="3", cluster__nproc="4", cluster__nodes="2", cluster__master_port="29500"
    )
    found = [problem for problem in problems if problem.path == "strategy"]
    assert "tensor x pipeline x context = 3 x 1 x 1 = 3; 8 = 2 x 3 + 2" in found[0].why
    assert found[0].fix == "start 6 or 9 ranks, or choose axes whose product divides 8: 1, 2, 4, 8"


def test_nodes_must_know_each_other() -> None:
    paths = [problem.path for problem in found_in(cluster__nodes="2", cluster__node_rank="2")]
    assert paths == ["cluster.node_rank", "cluster.master_port"]
    (problem,) = found_in(cluster__master_port="70000")
    assert "65535" in problem.why


def test_hardware_limits() -> None:
    (problem,) = found_in(hardware="2xA100-40GB", cluster__nproc="3")
    assert problem.path == "cluster.nproc" and "nproc=3 on 2 GPUs" in problem.what
    assert found_in(hardware="2xA100-40GB", cluster__nproc="2", precision__dtype="bf16") == []
    assert found_in(hardware="2xA100-40GB", run__device="cuda") == []
    without = replace(parse_hardware("2xA100-40GB"), gpus_per_node=())
    (problem,) = check(load(None, {"run.device": "cuda"}, {}).config, without)
    assert problem.path == "run.device" and "no GPU" in problem.why
    (problem,) = found_in(hardware="1xV100-16GB", precision__dtype="bf16")
    assert problem.path == "precision.dtype" and "7.0" in problem.why


def test_8_bit_states_are_adams_on_the_device() -> None:
    assert not found_in(optimizer__state_bits="8")
    found = found_in(
        optimizer__state_bits="8", optimizer__name="sgd", offload__optimizer="cpu", strategy__zero_stage="1"
    )
    problems = [problem.what for problem in found if problem.path == "optimizer.state_bits"]
    assert problems == ["state_bits=8 with name=sgd", "state_bits=8 with offload.optimizer=cpu"]


def test_only_one_command_for_all_hosts_can_start_them_again() -> None:
    by_hand = {"cluster.nodes": "2", "cluster.master_port": "29500", "cluster.max_restarts": "1"}
    (problem,) = check(load(None, by_hand, {}).config)
    assert problem.path == "cluster.max_restarts" and "--hosts" in problem.fix
    assert not check(
        load(None, {"cluster.hosts": "a:1,b:1", "cluster.nodes": "2", "cluster.max_restarts": "1"}, {}).config
    )


def test_compression_needs_as_many_ranks_on_each_host() -> None:
    given = {"cluster.hosts": "a:1,b:2", "cluster.nproc": "1", "compression.gradients": "int8"}
    assert "cluster.hosts" in [problem.path for problem in check(load(None, given, {}).config)]
    given["cluster.hosts"] = "a:2,b:2"
    assert "cluster.hosts" not in [problem.path for problem in check(load(None, given, {}).config)]
