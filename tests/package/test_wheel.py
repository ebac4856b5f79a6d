"""The wheel, built by way of the source distribution, holds the tree: every module once, under `distui`."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import distui

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".tcss", ".proto", ".pyi", ".typed", ".service", ".j2"}
PACKAGES = ("core", "daemon", "kernels", "launcher", "proto", "tui")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of both distributions of a copy of the tree."""
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
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel_names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


def test_the_wheels_modules_are_the_trees(wheel_names: set[str]) -> None:
    expected = set()
    for folder in (*PACKAGES, "distui"):
        for path in (ROOT / folder).rglob("*"):
            if "__pycache__" in path.parts or path.suffix not in SUFFIXES:
                continue
            relative = path.relative_to(ROOT).as_posix()
            expected.add(relative if folder == "distui" else f"distui/{relative}")
    found = {name for name in wheel_names if ".dist-info/" not in name and not name.endswith(".md")}
    assert found == expected


def test_there_is_one_top_level_name(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"distui"}


def test_the_metadata_is_the_projects(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    told = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (told["Name"], told["Version"]) == ("distui", distui.__version__)
    assert told["License-Expression"] == "Apache-2.0"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_has_the_papers_and_the_docs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    pages = {page.relative_to(ROOT).as_posix() for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*"))}
    assert {"LICENSE", "constraints.txt", *pages} <= names


def test_the_folders_are_links() -> None:
    for package in PACKAGES:
        link = ROOT / "distui" / package
        assert link.is_symlink() and link.resolve() == (ROOT / package).resolve()
