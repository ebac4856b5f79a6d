"""`distui plan --script` and the model that distui.toml remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.launcher.cli import run

SCRIPT = """
import torch
from torch import nn
import distui.demo

def build_model():
    return distui.demo.ByteGPT(3, 64, context=32)

def with_inputs():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(2, 8)

def number():
    return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def test_a_scripts_model_is_counted_exactly_on_the_meta_device() -> None:
    from distui.core.plan.memory import activation_elements
    from distui.demo.model import ByteGPT
    from distui.launcher.probes.script_model import load_script_model

    spec = load_script_model("train.py:build_model")
    model = ByteGPT(3, 64, context=32)
    assert spec.num_parameters == sum(param.numel() for param in model.parameters())
    assert (spec.num_layers, spec.hidden_size, spec.sequence_length) == (3, 64, 32)
    assert spec.block_parameters == sum(param.numel() for param in model.blocks[0].parameters())
    assert spec.forward_flops > 2 * 3 * spec.block_parameters * 0.9
    assert activation_elements(spec) == pytest.approx(16 * 64, rel=0.25), "flash attention, as a GPT-2 block has it"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py:number", "int, not a torch.nn.Module"),
        ("train.py:absent", "it has build_model, number, with_inputs"),
        ("other.py:build_model", "no script other.py"),
        ("train.py", "FILE.py:FUNCTION"),
    ],
)
def test_what_is_no_model_is_said(script: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--script", script, "--hardware", "8xA100-40GB"]) == 2
    assert words in capsys.readouterr().err


def test_the_remembered_model_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--hardware", "8xA100-40GB", "--json"]
    assert run(arguments) == 2
    assert "no model is named" in capsys.readouterr().err
    (folder / "distui.toml").write_text('[run]\nmodel = "train.py:with_inputs"\n')
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Sequential"
    assert run([*arguments, "--model", "gpt2", "--backend", "all", "--compression", "int8"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert any("int8 gradients" in plan["name"] for plan in plans)


def test_calibration_of_a_named_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--calibrate", "--hardware", "8xA100-40GB"]) == 2
    assert "only named" in capsys.readouterr().err
