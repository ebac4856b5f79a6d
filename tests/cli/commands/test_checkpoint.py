"""`distui checkpoint` on a checkpoint that a real engine wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distui.launcher import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that save_state wrote after one step, and the model's weights then."""
    import torch

    import distui

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    engine = distui.Engine()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    engine.backward(model(torch.randn(4, 5)).square().mean())
    optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoints") / "step1"
    engine.save_state(str(folder))
    return folder, {name: value.clone() for name, value in engine.get_state_dict(model).items()}


def test_inspect_says_what_is_in_it(saved: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved
    assert cli.run(["checkpoint", "inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "step 1, whole: " in told and "saved by 1 rank(s) under ZeRO-0, fp32" in told
    assert "model0.0.weight  7 x 5" in told and f"6 parameters, {5 * 7 + 7 + 7 + 7 + 14 + 2} values" in told
    assert cli.run(["checkpoint", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 1


def test_a_name_that_acts_on_a_terminal_is_shown_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import distui

    model = torch.nn.Linear(2, 2)
    model.register_parameter("w\x1b[2J\x1b]0;t\x07", torch.nn.Parameter(torch.ones(3)))
    engine = distui.Engine()
    engine.prepare(model, torch.optim.AdamW(model.parameters()))
    engine.save_state(str(tmp_path / "step1"))
    capsys.readouterr()
    assert cli.run(["checkpoint", "inspect", str(tmp_path / "step1")]) == 0
    told = capsys.readouterr().out
    assert "model0.w  3" in told and "\x1b" not in told


def test_consolidate_writes_the_weights(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    folder, weights = saved
    assert cli.run(["checkpoint", "consolidate", str(folder), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {"0.weight", "0.bias", "1.running_mean", "2.weight"} <= set(found) <= set(weights)
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name]), name
    assert cli.run(["checkpoint", "consolidate", str(folder), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


def _contents(folder: Path) -> dict[str, Any]:
    from distui.core.checkpoint.formats.opening import open_checkpoint

    checkpoint = open_checkpoint(folder)
    numbers = {key: entry.number for key, entry in checkpoint.entries.items() if entry.number is not None}
    return {key: checkpoint.tensor(key) for key in checkpoint.entries if key not in numbers}


def test_reshard_writes_the_same_state_for_other_ranks(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import distui

    folder, weights = saved
    before = _contents(folder)
    source = folder
    for ranks, stage in ((3, 2), (2, 3), (1, 0)):
        output = tmp_path / f"for{ranks}"
        command = ["checkpoint", "reshard", str(source), str(output), "--ranks", str(ranks), "--stage", str(stage)]
        assert cli.run(command) == 0
        assert f"step 1 for {ranks} rank" in capsys.readouterr().out
        assert cli.run(["checkpoint", "inspect", str(output)]) == 0
        assert f"saved by {ranks} rank(s) under ZeRO-{stage}" in capsys.readouterr().out
        assert {path.name for path in output.glob("*/rank*.bin")} == {f"rank{rank:05d}.bin" for rank in range(ranks)}
        after = _contents(output)
        assert after.keys() == before.keys() and len(after) > 12
        assert all(torch.equal(after[key], value) for key, value in before.items())
        source = output
    engine = distui.Engine()
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    model, _ = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    engine.load_state(str(tmp_path / "for3"))
    assert all(torch.equal(value, weights[name]) for name, value in engine.get_state_dict(model).items())
    # Wrong input.
    assert cli.run(["checkpoint", "reshard", str(folder), str(tmp_path / "for3"), "--ranks", "2"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.run(["checkpoint", "reshard", str(folder), str(tmp_path / "new"), "--ranks", "0"]) == 2
    assert cli.run(["checkpoint", "reshard", str(tmp_path), str(tmp_path / "new"), "--ranks", "2"]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_is_no_checkpoint_or_damaged_is_refused(
    saved: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = saved
    assert cli.run(["checkpoint", "inspect", str(folder.parent / "nothing")]) == 2
    assert "step1" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with open(next(copy.glob("*/common.json")), "ab") as state:
        state.write(b"x")
    assert cli.run(["checkpoint", "inspect", str(copy)]) == 2
    assert "common.json has" in capsys.readouterr().err
