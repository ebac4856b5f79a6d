"""`distui as`: commands of Accelerate and DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from distui.compat.not_offered import NotOffered
from distui.core.config.settings import load
from distui.core.errors import UserError
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
    with pytest.raises(UserError, match="max_shard_size=10"):
        _run("deepspeed", "zero_to_fp32", "--max_shard_size", "10B", str(tmp_path / "state"), str(tmp_path / "no"))
    with pytest.raises(NotOffered, match="exclude_frozen_parameters"):
        _run("deepspeed", "zero_to_fp32", "--exclude_frozen_parameters", str(tmp_path / "state"), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
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
    assert "int4" not in told and "float16" not in told
    both = _run("accelerate", "estimate-memory", str(tmp_path), "--dtypes", "float32", "float16")
    assert "float32" in both and "float16" in both and "int8" not in both
    with pytest.raises(UserError, match="needs timm") if importlib.util.find_spec("timm") is None else nullcontext():
        _run("accelerate", "estimate-memory", "timm/resnet18")


def test_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _run("accelerate", "config", "default", "--mixed_precision", "bf16")
    assert load(None, {}).config.precision.dtype == "bf16"
    with pytest.raises(UserError, match=r"distui\.toml is there"):
        _run("accelerate", "config", "default")
    with pytest.raises(UserError, match="TOML"):
        _run("accelerate", "config", "--config_file", "default_config.yaml")
    with pytest.raises(UserError, match="TOML"):
        _run("accelerate", "test", "--config_file", "default_config.yaml")
    with pytest.raises(UserError, match="needs a terminal"):  # the wizard's own word: it is what `config` starts
        _run("accelerate", "config")
    (tmp_path / "distui.toml").unlink()
    (tmp_path / "theirs.yaml").write_text("distributed_type: MULTI_GPU\nmixed_precision: fp16\nnum_processes: 2\n")
    _run("accelerate", "config", "update", "--config_file", "theirs.yaml")
    assert load(None, {}).config.precision.dtype == "fp16"


def test_the_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distui.launcher.commands import doctor

    monkeypatch.setattr(doctor.command, "callback", lambda **options: print("what the doctor says"))
    theirs = tmp_path / "accelerate" / "default_config.yaml"
    theirs.parent.mkdir()
    theirs.write_text("mixed_precision: bf16\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (("accelerate", "env"), ("deepspeed", "ds_report")):
        told = _run(*words)
        assert f"torch {version('torch')}" in told
        assert "what the doctor says" in told
    assert "mixed_precision: bf16" in _run("accelerate", "env")
    quiet = _run("deepspeed", "ds_report", "--hide_operator_status", "--hide_errors_and_warnings")
    assert "torch" in quiet and "operations" not in quiet and "doctor" not in quiet
