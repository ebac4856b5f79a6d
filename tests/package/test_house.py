"""The house rules that a reader relies on: what an import loads, how wide a class is, what has a docstring."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_PUBLIC_METHODS = 20
MATCHES_AN_OUTSIDE_API = {"Engine", "Ranks", "Queries", "Accelerator"}
TORCH_FREE = ("tui", "daemon", "proto", "core/plan", "core/telemetry", "core/config", "core/hardware", "core/trackers")
TORCH_FREE_FILES = ("core/paths", "core/errors", "core/backends/registry")
NEED_TORCH = {"core/telemetry/collectives"}
"""Beside files that are torch-free: what records torch's own collectives, loaded once torch is there."""
TORCH_PROCESSES = {
    "launcher/node/agent.py",
    "launcher/probes/calibrate_bench.py",
    "launcher/probes/collectives_bench.py",
    "launcher/probes/model_probe.py",
}
"""Modules of the launcher that run in processes of their own, where ranks are started or measured."""


def sources() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if "_pb2" not in path.name and path.is_file() and not path.is_symlink():
            yield path


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the modules that a file imports, without those under `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def package_files(package: str) -> list[Path]:
    return [path for path in sources() if path.relative_to(ROOT).as_posix().startswith(f"{package}/")]


def test_commands_import_others_inside_functions() -> None:
    heavy = {"torch", "textual", "grpc", "pydantic", "rich", "zmq"}
    for path in package_files("launcher"):
        name = path.relative_to(ROOT).as_posix()
        loaded = {module.split(".")[0] for module in imports(path, top_level_only=True)} & heavy
        if not name.startswith(("launcher/commands/", "launcher/cli.py")):
            loaded &= {"torch"}
        assert not loaded or name in TORCH_PROCESSES, f"{name} loads {loaded}"


def _modules_after(code: str) -> set[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd="/"
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_torch_free_modules_never_load_torch() -> None:
    modules = []
    for path in sources():
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if (name.startswith(TORCH_FREE) or name in TORCH_FREE_FILES) and name not in NEED_TORCH:
            modules.append("distui." + name.replace("/", ".").removesuffix(".__init__"))
    assert len(modules) > 20
    wanted = [module for module in modules if not module.endswith("__main__")]
    loaded = _modules_after("\n".join(f"import {module}" for module in wanted))
    assert "torch" not in loaded


def test_importing_distui_loads_nothing_heavy() -> None:
    loaded = _modules_after("import distui")
    assert not loaded & {"torch", "textual", "grpc", "pydantic", "click", "numpy"}


def test_help_loads_only_click() -> None:
    call = "sys.argv = ['distui', '--help']; cli.main()"
    code = f"import distui.launcher.cli as cli\ntry:\n    {call}\nexcept SystemExit:\n    pass"
    loaded = _modules_after(code)
    assert "click" in loaded
    assert not loaded & {"torch", "textual", "grpc", "pydantic", "rich", "numpy", "tomlkit", "psutil"}


def test_classes_are_narrow() -> None:
    wide = {}
    for path in sources():
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in MATCHES_AN_OUTSIDE_API:
                public = [
                    item
                    for item in node.body
                    if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
                    and not item.name.startswith(("_", "on_", "action_", "watch_", "compose", "render"))
                ]
                if len(public) > MAX_PUBLIC_METHODS:
                    wide[node.name] = len(public)
    assert not wide


def test_public_functions_have_docstrings() -> None:
    bare = []
    for package in ("core", "daemon", "launcher", "kernels"):
        for path in package_files(package):
            tree = ast.parse(path.read_text())
            if not ast.get_docstring(tree) and path.read_text().strip():
                bare.append(str(path.relative_to(ROOT)))
            for node in tree.body:
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    continue
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    bare.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not bare


def _names(path: Path) -> set[str]:
    """Return what a module defines or takes in at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ImportFrom, ast.Import)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


def _is_there(room: Path, name: str) -> bool:
    """Tell whether `module`, `module.Name` or `Name` is in a room."""
    *folders, last = name.split(".")
    for part in folders:
        if (room / part).with_suffix(".py").is_file():
            return last in _names((room / part).with_suffix(".py"))
        room = room / part
    inside = room / "__init__.py"
    return (room / last).exists() or (room / f"{last}.py").exists() or (inside.exists() and last in _names(inside))


def test_each_room_says_what_it_is_for_and_names_a_way_in_that_exists() -> None:
    rooms = {path.parent for package in ("core", "daemon", "launcher", "tui") for path in package_files(package)}
    assert len(rooms) > 30
    for room in sorted(rooms):
        text = " ".join((ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").split())
        assert re.search(r"\. Way in: .*\b([Mm]ust not|[Kk]nows|knowing)\b", text), room
        for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)*)`", text.partition("Way in: ")[2]):
            wrong = f"{room.relative_to(ROOT)}/__init__.py names `{name}`, which is not there"
            assert name.startswith("distui.") or _is_there(room, name), wrong


def test_every_path_and_link_in_the_docs_is_there() -> None:
    tops = "core|daemon|launcher|tui|kernels|proto|tests|benchmarks|examples|scripts|docs|distui"
    missing = []
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = page.read_text()
        paths = re.findall(rf"`((?:{tops})/[\w/.*-]*)`", text)
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
        missing += [f"{page.name}: {path}" for path in paths if "NAME" not in path and not any(ROOT.glob(path))]
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
    assert not missing


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    patterns = request.config.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert not [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def test_nothing_of_a_workplace_is_named() -> None:
    pattern = re.compile(r"/work/|/root/|session_|/\.library|farm-bench")
    found = []
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        readable = path.suffix in {".py", ".md", ".toml", ".sh", ".proto"} and path.is_file()
        if readable and path != Path(__file__) and pattern.search(path.read_text()):
            found.append(name)
    assert not found
