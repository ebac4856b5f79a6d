"""What stands around the code agrees with it: the version, the licence, the supported Pythons, and what CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomlkit
import yaml

import distui

ROOT = Path(__file__).parents[2]
PROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text()).unwrap()["project"]


def workflows() -> dict[str, Any]:
    return {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def supported_pythons() -> list[str]:
    named = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in PROJECT["classifiers"])
    return [match[1] for match in named if match]


def test_ci_runs_on_every_supported_python() -> None:
    assert f">={supported_pythons()[0]}" == PROJECT["requires-python"]
    matrices = [
        job["strategy"]["matrix"]["python"] for workflow in workflows().values() for job in workflow["jobs"].values()
    ]
    assert matrices == [supported_pythons()]


def test_ci_runs_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = [
        step["run"]
        for workflow in workflows().values()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    called = [re.fullmatch(r"make ([a-z-]+) PYTHON=python", line) for line in run]
    assert all(called), run
    assert {"check", "test"} <= {match[1] for match in called if match} <= targets


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    told = subprocess.run([sys.executable, "-m", "distui", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"distui, version {distui.__version__}\n"
    assert f"{distui.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0" and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "[yyyy]" not in text
