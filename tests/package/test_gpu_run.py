"""`make gpu` where there is none: it says so; and the same code on CPU ranks, at sizes that say nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu/__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_in_one_line_what_is_missing() -> None:
    done = _run()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"no GPU: torch {torch.__version__} finds none on this machine\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_make_gpu_says_so_too() -> None:
    environment = os.environ | {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    command = ["sh", "scripts/gpu.sh", "no-environment"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs an NVIDIA GPU" in done.stderr
    assert not (ROOT / "no-environment").exists()


def _tiny(out: Path, *words: str) -> tuple[dict[str, Any], str]:
    done = _run("--device", "cpu", "--tiny", "--out", str(out), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["parts"], done.stdout


def test_parity_runs_on_cpu_ranks(tmp_path: Path) -> None:
    parts, text = _tiny(tmp_path / "figures.json", "--parts", "parity", "kernels")
    assert all(row["ok"] for row in parts["parity"].values()) and len(parts["parity"]) == 7
    assert "| stage 3, all on the host |" in text


@pytest.mark.matrix  # a minute of two cores
def test_peers_and_the_largest_model_run_on_cpu_ranks(tmp_path: Path) -> None:
    words = ["--variants", "ddp", "stage3", "--parts", "llama", "largest"]
    parts, text = _tiny(tmp_path / "figures.json", *words)
    assert [row["tokens_per_s"] > 0 for row in parts["llama"].values()] == [True] * 2
    losses = [row["loss"] for row in parts["llama"].values()]
    assert losses == pytest.approx([losses[0]] * 2, abs=2e-3), "all train the same model on the same data"
    assert parts["largest"]["layers"] == 4 and parts["largest"]["host_bytes"] > 16 * parts["largest"]["params"] / 2
    assert "| stage3 | " in text


def _figures(**parts: Any) -> dict[str, Any]:
    return {"device": "Some GPU", "world": 1, "torch": "2.11", "parts": parts}


def test_what_failed_is_told_from_what_was_left_out(benchmark: ModuleType) -> None:
    good = {"tokens_per_s": 1e4, "mfu": 0.4, "peak_bytes": 2**30}
    right = _figures(
        tests={"ok": True},
        parity={"stage 0": {"error": 1e-6, "ok": True}},
        llama={"ddp": good, "deepspeed3": {"left_out": "no time"}},
        kernels={"left_out": "no time"},
        largest={"params": 10**9, "step_s": 2.0, "ended": "time"},
    )
    assert benchmark.wrong(right) == []
    assert "| ddp | 10,000 | 40.0% | 1.0 |" in benchmark.rows(right)
    assert "| 1.00B | 2.0 | time |" in benchmark.rows(right)
    for part, fault in {
        "tests": {"ok": False},
        "parity": {"stage 0": {"error": 0.5, "ok": False}},
        "llama": {"stage3": {"failed": "out of memory"}},
        "kernels": {"failed": "no Triton"},
        "largest": {"ended": "Traceback"},
    }.items():
        assert benchmark.wrong(_figures(**(right["parts"] | {part: fault}))) == [part]


def test_kernels_stand_in_the_rows(benchmark: ModuleType) -> None:
    measured = [{"name": "rms_norm", "us": 12.34, "of_copy": 0.93, "torch": None}]
    assert "| rms_norm | 12.3 | 93% | n/a |" in benchmark.rows(_figures(kernels=measured))
    assert "| rms_norm | 12.3 | 93% | n/a |" not in benchmark.rows(_figures(kernels={"left_out": "no time"}))


def test_the_size_of_the_model_is_known_without_building_it(benchmark: ModuleType) -> None:
    import gpu_ranks  # type: ignore[import-not-found]

    model = gpu_ranks.build_model(benchmark.TINY)
    assert sum(param.numel() for param in model.parameters()) == benchmark.count_params(benchmark.TINY)
    assert 0.9e9 < benchmark.count_params(benchmark.SHAPES["llama"]) < 1.1e9
