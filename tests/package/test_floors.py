"""The floors of the house: who imports whom, over all imports, those in functions and under `TYPE_CHECKING` too."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
MAX_FILES = 20
FOLDERS = ("core", "daemon", "kernels", "launcher", "proto", "tui")
MAY_IMPORT = {
    "proto": set[str](),
    "kernels": set[str](),
    "core": {"kernels", "proto"},
    "daemon": {"core", "proto"},
    "tui": {"core", "proto"},
    "launcher": {"compat", "core", "daemon", "demo", "distui", "kernels", "proto", "tui"},
    "compat": {"core", "launcher"},
    "demo": {"distui"},
    "__main__": {"launcher"},
    "distui": {"core", "launcher"},
}
"""The packages of ours that each package may import; `distui` is its `__init__.py`, which loads the public names."""
FLOORS = {
    "engine": 9,
    "backends": 8,
    "checkpoint": 7,
    "model": 7,
    "parallel": 6,
    "sharding": 5,
    "plan": 5,
    "telemetry": 4,
    "axes": 4,
    "config": 3,
    "data": 2,
    "hardware": 2,
    "ranks": 1,
    "trackers": 1,
    "paths": 0,
    "errors": -1,
}
"""The rooms of core: a room imports those on lower floors only."""
SPEAKS_PROTO = "telemetry"
"""The only room of core that may import `distui.proto`."""


class Import(NamedTuple):
    """One import of ours: `place` is the importing file and line."""

    place: str
    importer: str
    imported: str


def modules(root: Path) -> dict[str, Path]:
    """Return the file of each module of distui under `root`, generated code too."""
    found = {}
    for folder in (*FOLDERS, "distui"):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts if folder == "distui" else ("distui", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> Iterator[Import]:
    """Give every import of a module of ours by another, wherever in the file it stands."""
    ours = modules(root)
    for importer, path in ours.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # Ruff refuses relative ones, whose names would be found in no package here.
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                while name and name not in ours:
                    name = name.rpartition(".")[0]
                if name and name != importer:
                    yield Import(f"{path.relative_to(root)}:{node.lineno}", importer, name)


def upward(root: Path) -> list[str]:
    """Return each import that goes up, to a room of the same floor, or to a package that its own may not know."""
    wrong = []
    for place, importer, imported in imports(root):
        package, room, *_ = *importer.split(".")[1:], "", ""
        other, other_room, *_ = *imported.split(".")[1:], "", ""
        package, other = package or "distui", other or "distui"
        if package != other:
            allowed = MAY_IMPORT.get(package, set())
            if other not in allowed or ((package, other) == ("core", "proto") and room != SPEAKS_PROTO):
                wrong.append(f"{place} imports {imported}: {package} may import {sorted(allowed) or 'nothing of ours'}")
        elif package == "core" and room != other_room:
            unknown = [name for name in (room, other_room) if name not in FLOORS]
            if unknown:
                wrong.append(f"{place} imports {imported}: {unknown} stand on no floor")
            elif FLOORS[other_room] >= FLOORS[room]:
                floors = f"{room} is on floor {FLOORS[room]}, {other_room} on floor {FLOORS[other_room]}"
                wrong.append(f"{place} imports {imported}: {floors}")
    return wrong


def circle(root: Path) -> list[str]:
    """Return the imports of one circle of files, or nothing where there is none."""
    arrows: dict[str, dict[str, str]] = {}
    for place, importer, imported in imports(root):
        arrows.setdefault(importer, {})[imported] = place
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        around = error.args[1][::-1]  # graphlib gives what is imported before what imports it
        return [f"{arrows[a][b]} imports {b}" for a, b in itertools.pairwise(around)]
    return []


def code(root: Path) -> Iterator[Path]:
    """Give every file of code, tests too, without what is generated."""
    for folder in (*FOLDERS, "distui", "tests", "benchmarks", "examples", "scripts"):
        for path in (root / folder).rglob("*"):
            if path.suffix in {".py", ".sh", ".proto", ".tcss"} and "_pb2" not in path.name and not path.is_symlink():
                yield path.relative_to(root)


def crowded(root: Path) -> list[str]:
    """Return each folder with too many files of code and each file with too many lines."""
    files = list(code(root))
    wrong = [
        f"{folder}/ has {count} files of code, more than {MAX_FILES}"
        for folder, count in Counter(path.parent for path in files).items()
        if count > MAX_FILES
    ]
    for path in files:
        if (count := len((root / path).read_text(encoding="utf-8").splitlines())) > MAX_LINES:
            wrong.append(f"{path} has {count} lines, more than {MAX_LINES}")
    return wrong


def test_no_import_goes_up() -> None:
    assert len(modules(ROOT)) > 250, "the packages are elsewhere"
    assert not upward(ROOT)


def test_no_two_files_import_each_other() -> None:
    assert not circle(ROOT)


def test_no_folder_and_no_file_is_large() -> None:
    assert not crowded(ROOT)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


TARGETS = {
    f"{name}.py": ""
    for name in ("core/engine/engine", "core/plan/search", "core/ranks/ops", "core/errors", "core/new/x", "proto/t_pb2")
} | {"core/engine/__init__.py": "", "daemon/serve/x.py": "", "distui/__init__.py": ""}


@pytest.mark.parametrize(
    ("importer", "text", "wrong"),
    [
        ("core/ranks/a.py", "from distui.core.errors import UserError", None),
        ("core/ranks/a.py", "import os\nfrom distui.core.ranks import ops", None),
        ("core/telemetry/a.py", "from distui.proto import t_pb2", None),
        (
            "core/ranks/a.py",
            "\nfrom distui.core.plan import search",
            ":2 imports distui.core.plan.search: ranks is on floor 1",
        ),
        ("core/ranks/a.py", "import distui.core.engine.engine as e", ":1 imports distui.core.engine.engine: ranks is"),
        (
            "core/ranks/a.py",
            "from distui.core.engine import Engine",
            ":1 imports distui.core.engine: ranks is on floor 1",
        ),
        (
            "core/trackers/a.py",
            "def f():\n    from distui.core.ranks.ops import g",
            ":2 imports distui.core.ranks.ops: tr",
        ),
        (
            "core/ranks/a.py",
            "if TYPE_CHECKING:\n    import distui.core.plan.search",
            ":2 imports distui.core.plan.search:",
        ),
        (
            "core/ranks/a.py",
            "from distui.core.new.x import y",
            ":1 imports distui.core.new.x: ['new'] stand on no floor",
        ),
        ("core/ranks/a.py", "from distui.proto import t_pb2", ":1 imports distui.proto.t_pb2: core may import"),
        ("core/ranks/a.py", "from distui import Engine", ":1 imports distui: core may import"),
        ("tui/a.py", "from distui.daemon.serve import x", ":1 imports distui.daemon.serve.x: tui may import"),
        ("kernels/a.py", "from distui.core.errors import UserError", ": kernels may import nothing of ours"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, importer: str, text: str, wrong: str | None) -> None:
    found = upward(tree(tmp_path, {**TARGETS, importer: text}))
    assert len(found) == (wrong is not None), found
    if wrong is not None:
        assert found[0].startswith(f"{importer}:") and wrong in found[0]


def test_a_circle_is_found_across_packages_and_inside_functions(tmp_path: Path) -> None:
    files = {
        "launcher/a.py": "import os\nfrom distui.compat import b",
        "distui/compat/b.py": "def f():\n    from distui.tui.c import d",
        "tui/c.py": "if TYPE_CHECKING:\n    from distui.launcher.a import e",
        "tui/apart.py": "from distui.tui import c",
    }
    assert sorted(circle(tree(tmp_path, files))) == [
        "distui/compat/b.py:2 imports distui.tui.c",
        "launcher/a.py:2 imports distui.compat.b",
        "tui/c.py:2 imports distui.launcher.a",
    ]
    (tmp_path / "tui/c.py").write_text("")
    assert not circle(tmp_path)


def test_a_full_folder_and_a_long_file_are_found(tmp_path: Path) -> None:
    files = {f"tests/unit/{number}.py": "" for number in range(MAX_FILES)} | {"core/a.py": "\n" * MAX_LINES}
    assert not crowded(tree(tmp_path, files))
    tree(tmp_path, {"tests/unit/one_more.sh": "", "core/a.py": "\n" * (MAX_LINES + 1), "proto/t_pb2.py": "\n" * 999})
    assert crowded(tmp_path) == [
        "tests/unit/ has 21 files of code, more than 20",
        "core/a.py has 401 lines, more than 400",
    ]
