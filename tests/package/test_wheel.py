"""The wheel holds the tree: every module once, under `distui`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".proto", ".tcss", ".service"}
PACKAGES = ("core", "daemon", "kernels", "launcher", "proto", "tui")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        origin, target = ROOT / name, source / name
        if not origin.is_symlink() and not origin.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            target.symlink_to(origin.readlink())
        else:
            target.write_bytes(origin.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheels_modules_are_the_trees(wheel_names: set[str]) -> None:
    expected = set()
    for folder in (*PACKAGES, "distui"):
        for path in (ROOT / folder).rglob("*"):
            if "__pycache__" in path.parts or path.suffix not in {
                ".py",
                ".tcss",
                ".proto",
                ".pyi",
                ".typed",
                ".service",
                ".j2",
            }:
                continue
            relative = path.relative_to(ROOT).as_posix()
            expected.add(relative if folder == "distui" else f"distui/{relative}")
    found = {name for name in wheel_names if ".dist-info/" not in name and not name.endswith(".md")}
    assert found == expected


def test_there_is_one_top_level_name(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"distui"}


def test_the_folders_are_links() -> None:
    for package in PACKAGES:
        link = ROOT / "distui" / package
        assert link.is_symlink() and link.resolve() == (ROOT / package).resolve()
