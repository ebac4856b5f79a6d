"""`distui launch --as accelerate`: a script runs unchanged, and nothing but the user's own modules sees the face."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.launcher.compat.faces import FACES, Face, check_face, compiled

Launch = Callable[..., subprocess.CompletedProcess[str]]

SCRIPT = """\
import argparse

import torch
import accelerate.utils
import accelerate.logging as talk
from accelerate import Accelerator
from helpers.data import make_loader

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
steps = parser.parse_args().steps

accelerator = Accelerator()
accelerate.utils.set_seed(0)
logger = talk.get_logger(__name__)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader(steps * 4))
count = 0
for (x,) in loader:
    loss = model(x).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    count += 1
stage = accelerator.engine.config.strategy.zero_stage
accelerator.print(f"{count} steps on {accelerator.num_processes} ranks at stage {stage}")
if __name__ == "__main__" and steps == 3:
    accelerate.prepare_pippy(model)
accelerator.end_training()
"""
HELPER = """\
import torch
from accelerate.utils import is_torch_version

def make_loader(samples):
    assert is_torch_version(">=", "2.0")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(samples, 3)), batch_size=2)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A script and a package of its own, written for Accelerate."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "data.py").write_text(HELPER)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_runs_unchanged_with_the_strategy_of_the_command_line(launch: Launch, project: Path) -> None:
    done = launch("--as", "accelerate", "--nproc", "2", "--zero", "2", "train.py", "--steps", "2", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "2 steps on 2 ranks at stage 2" in done.stdout
    assert not list(project.rglob("*.pyc"))  # plain Python must not find the renamed imports later


def test_what_is_not_offered_stops_the_script_at_its_line(launch: Launch, project: Path) -> None:
    done = launch("--as", "accelerate", "--nproc", "1", "train.py", "--steps", "3", cwd=project)
    assert done.returncode == 3
    assert f'train.py", line {SCRIPT.splitlines().index(SCRIPT.splitlines()[-2]) + 1}' in done.stderr
    assert "prepare_pippy is not offered by distui" in done.stderr
    assert "dispatch_model" in done.stderr and "compat.py" not in done.stderr


def test_an_unknown_face_is_refused_before_anything_starts(launch: Launch, project: Path) -> None:
    done = launch("--as", "acelerate", "train.py", cwd=project)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: --as acelerate is unknown"
    assert "write --as accelerate" in done.stderr
    check_face(None)
    with pytest.raises(UserError):
        check_face("lightning")


def _imports(code: str) -> dict[str, object]:
    values: dict[str, object] = {}
    exec(compiled(code, "script.py", {"json": "email", "xml": "email"}), values)
    return values


def test_every_form_of_import_is_renamed() -> None:
    import email.charset
    import email.message

    assert _imports("import json")["json"] is email
    assert _imports("import json as j")["j"] is email
    assert _imports("import json.message")["json"] is email
    assert _imports("import json.message as m, os")["m"] is email.message
    assert _imports("from json import message")["message"] is email.message
    assert _imports("from xml.charset import Charset")["Charset"] is email.charset.Charset
    assert _imports("import importlib\nm = importlib.import_module('json.message')")["m"] is email.message
    assert _imports("m = __import__('json')")["m"] is email
    assert _imports("text = 'json'")["text"] == "json"


def test_lines_of_a_traceback_stay_right() -> None:
    code = "import json, os\nfrom json import message\n\n\ndef f():\n    return 1 / 0\n\nf()\n"
    try:
        exec(compiled(code, "script.py", {"json": "email"}), {})
    except ZeroDivisionError as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "script.py"]
    assert lines == [8, 6]


def test_only_the_users_own_modules_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, library = tmp_path / "project", tmp_path / "project" / ".venv" / "lib" / "site-packages"
    for folder in (project, library):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module_of_{'user' if folder is project else 'library'}.py").write_text("import json\n")
    face = Face({"json": "email"}, [project])
    monkeypatch.setattr(sys, "path", [str(project), str(library), *sys.path])
    assert face.find_spec("module_of_library") is None
    assert face.find_spec("json") is None and face.find_spec("textwrap") is None and face.find_spec("torch") is None
    spec = face.find_spec("module_of_user")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.json.__name__ == "email"
    assert all(package.startswith("distui.compat.") for table in FACES.values() for package in table.values())


def test_the_check_of_accelerates_face_trains_what_one_process_trains(launch: Launch, tmp_path: Path) -> None:
    from distui.compat.accelerate.test_utils import check

    done = launch("--nproc", "2", "--zero", "3", str(check.__file__), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks trained what one process trains" in done.stdout
