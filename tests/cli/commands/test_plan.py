"""`distui plan` as people and programs call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.launcher.cli import run
from distui.launcher.commands.plan import parse_bytes

PLAN_KEYS = {
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
}
LLAMA_ON_EIGHT = ["plan", "--model", "llama-7b", "--hardware", "8xA100-40GB"]


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "state"))


def test_json_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LLAMA_ON_EIGHT, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"model", "hardware", "plans"}
    assert (document["model"], document["hardware"]) == ("llama-7b", "8xA100-40GB")
    assert document["plans"] and all(set(plan) == PLAN_KEYS for plan in document["plans"])
    fits = {plan["name"]: plan["fits"] for plan in document["plans"]}
    assert not fits["DDP"] and fits["ZeRO-3"]


def test_an_unmeasured_cpu_gives_null_and_never_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "gpt2", "--seq", "128", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    from distui.core.hardware.detect import detect

    if detect().device_kind == "cpu":
        assert all(plan["tokens_per_s"] is None for plan in plans)


def test_the_table_ranks_and_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LLAMA_ON_EIGHT, "--available", "--all"]) == 0
    out = capsys.readouterr().out
    assert "39.4 GiB a rank" in out
    table, _, misfits = out.partition("what does not fit:")
    assert "ZeRO-3" in table
    cut = [", TP " in row or ", PP " in row for row in table.splitlines() if "DDP" in row]
    assert all(cut), "whole it does not fit"
    assert "DDP: needs" in misfits and "of 39.4 GiB" in misfits


def test_rows_beyond_the_first_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LLAMA_ON_EIGHT) == 0
    short = capsys.readouterr().out
    assert "--all shows them" in short and "this version of distui cannot run yet" in short
    assert run([*LLAMA_ON_EIGHT, "--all"]) == 0
    whole = capsys.readouterr().out
    assert "--all shows them" not in whole and " *" in whole


def test_first_comes_what_this_version_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LLAMA_ON_EIGHT) == 0
    assert " *" not in capsys.readouterr().out
    assert run([*LLAMA_ON_EIGHT, "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)["plans"]
    assert run([*LLAMA_ON_EIGHT, "--json", "--available"]) == 0
    runs = [plan["name"] for plan in json.loads(capsys.readouterr().out)["plans"] if plan["fits"]]
    assert [plan["name"] for plan in everything if plan["fits"]][: len(runs)] == runs


def test_what_does_not_fit_tells_the_limit_and_what_is_kept_free(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LLAMA_ON_EIGHT, "--margin", "0.1"]) == 0
    assert "of 39.4 GiB, of which 10% (3.9) are kept free: model states" in capsys.readouterr().out.replace("\n", " ")


def test_explain_shows_every_term_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LLAMA_ON_EIGHT, "--explain", "ZeRO-3"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "gradients", "optimizer_states", "buffers", "activations", "arXiv 1910.02054"):
        assert word in out
    assert run([*LLAMA_ON_EIGHT, "--explain", "ZeRO-3", "--json"]) == 0
    terms = json.loads(capsys.readouterr().out)["terms"]
    assert all({"name", "value", "unit", "formula", "source"} == set(term) for term in terms)


def test_explain_names_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LLAMA_ON_EIGHT, "--explain", "ZeRo-9"]) == 2
    assert "ZeRO-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--model", "lama-7b"], "llama-7b"),
        (["plan", "--model", "llama-7b", "--hardware", "8xB100"], "B200"),
        (["plan", "--model", "llama-7b", "--hardware", "8xA100-40GB", "--nproc", "16"], "nproc"),
        (["plan", "--model", "llama-7b", "--hardware", "8xA100-40GB", "--host-memory", "lots"], "512GiB"),
        (["plan", "--model", "llama-7b", "--goal", "speed"], "throughput"),
        (["plan"], "--model"),
    ],
)
def test_a_mistake_is_three_lines_and_status_two(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and "why:" in error and "fix:" in error
    assert said in error
    assert "Traceback" not in error


def test_nothing_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "175B", "--hardware", "1xT4", "--available"]) == 0
    out = capsys.readouterr().out
    assert "nothing fits" in out and "needs" in out


def test_host_memory_and_network_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def plans(*more: str) -> dict[str, dict[str, object]]:
        assert run(["plan", "--model", "llama-13b", "--hardware", "2x4xRTX4090", "--json", *more]) == 0
        return {plan["name"]: plan for plan in json.loads(capsys.readouterr().out)["plans"]}

    name = "ZeRO-3, full checkpointing"
    assert plans()[name]["tokens_per_s"] is None, "a home-built cluster's network is not known"
    slow, fast = (plans("--network-gbits", speed)[name]["tokens_per_s"] for speed in ("10", "100"))
    assert isinstance(slow, float) and isinstance(fast, float) and slow < fast
    offload = "ZeRO-3, optimizer on cpu, full checkpointing"
    assert not plans("--host-memory", "16GiB")[offload]["fits"]
    assert plans("--host-memory", "1T")[offload]["fits"]


@pytest.mark.parametrize(
    ("text", "expected"), [("512GiB", 512 << 30), ("1.5 T", 3 << 39), ("64 gb", 64 << 30), ("1024", 1024)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(UserError):
        parse_bytes("12 bananas")
