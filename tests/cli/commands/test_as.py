"""`distui as`: commands of Accelerate and DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from distui.launcher.compat.commands import command


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.output)


def test_merge_weights(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "parts" / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "parts" / "model-00002-of-00002.safetensors")
    _run("accelerate", "merge-weights", str(tmp_path / "parts"), str(tmp_path / "one"))
    assert set(load_file(tmp_path / "one" / "model.safetensors")) == {"a", "b"}
    _run(
        "accelerate", "merge-weights", "--unsafe_serialization", "--remove_checkpoint_dir",
        str(tmp_path / "parts"), str(tmp_path / "two"),
    )  # fmt: skip
    assert set(torch.load(tmp_path / "two" / "pytorch_model.bin")) == {"a", "b"}
    assert not (tmp_path / "parts").exists()


def test_zero_to_fp32_of_a_checkpoint_of_distuis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.core.engine.engine import Engine

    engine = Engine(telemetry={"enabled": False})
    model = engine.prepare(torch.nn.Linear(3, 2))
    engine.save_state(str(tmp_path / "state"))
    _run("deepspeed", "zero_to_fp32", str(tmp_path / "state"), str(tmp_path / "bin"))
    _run("deepspeed", "zero_to_fp32", "--safe_serialization", str(tmp_path / "state"), str(tmp_path / "safe"))
    found = torch.load(tmp_path / "bin" / "pytorch_model.bin")
    for weights in (found, load_file(tmp_path / "safe" / "model.safetensors")):
        torch.testing.assert_close(weights["weight"], model.weight.detach())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_estimate_memory_of_a_folder(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **shape}))
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(str(tmp_path)))
    total = sum(param.numel() for param in model.parameters())
    told = _run("accelerate", "estimate-memory", str(tmp_path), "--dtypes", "float32")
    assert f"{total:,} parameters" in told
    assert "int4" not in told


def test_the_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.launcher.commands import doctor

    monkeypatch.setattr(doctor.command, "callback", lambda **options: print("what the doctor says"))
    for words in (("accelerate", "env"), ("deepspeed", "ds_report")):
        told = _run(*words)
        assert f"torch {version('torch')}" in told
        assert "what the doctor says" in told
