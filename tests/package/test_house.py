"""The house rules that a reader relies on: who imports whom, how long a file is, what an import loads."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "daemon", "kernels", "launcher", "proto", "tui")
MAX_LINES = 400
MAX_PUBLIC_METHODS = 20
MATCHES_AN_OUTSIDE_API = {"Engine", "Ranks", "Queries", "Accelerator"}
TORCH_FREE = ("tui", "daemon", "proto", "core/plan", "core/telemetry")
TORCH_FREE_FILES = (
    *("config", "settings", "config_check", "config_file", "paths", "errors", "batch"),
    *("backend_check", "backends/registry"),
)
TORCH_PROCESSES = {
    "launcher/agent.py",
    "launcher/calibrate_bench.py",
    "launcher/collectives_bench.py",
    "launcher/model_probe.py",
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


def ours(modules: set[str]) -> set[str]:
    """Return which of our packages are among `modules`."""
    return {module.split(".")[1] for module in modules if module.startswith("distui.") and module.count(".")}


def package_files(package: str) -> list[Path]:
    return [path for path in sources() if path.relative_to(ROOT).as_posix().startswith(f"{package}/")]


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("proto", {"proto"}),
        ("kernels", {"kernels"}),
        ("core", {"core", "kernels", "proto"}),
        ("daemon", {"daemon", "proto", "core"}),
        ("tui", {"tui", "proto", "core"}),
    ],
)
def test_who_imports_whom(package: str, allowed: set[str]) -> None:
    for path in package_files(package):
        wrong = ours(imports(path)) - allowed - {"__version__"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_telemetry_speaks_proto_in_core() -> None:
    for path in package_files("core"):
        if "proto" in ours(imports(path)):
            assert path.parent.name == "telemetry", path


def test_commands_import_others_inside_functions() -> None:
    heavy = {"torch", "textual", "grpc", "pydantic", "rich", "zmq"}
    for path in package_files("launcher"):
        name = path.relative_to(ROOT).as_posix()
        loaded = {module.split(".")[0] for module in imports(path, top_level_only=True)} & heavy
        if not name.endswith(("_command.py", "cli.py")):
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
        hardware = name.startswith("core/hardware")
        if name.startswith(TORCH_FREE) or hardware or name in {f"core/{stem}" for stem in TORCH_FREE_FILES}:
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


def test_files_are_short() -> None:
    long = {
        path.relative_to(ROOT): count for path in sources() if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


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
