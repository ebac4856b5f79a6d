"""`distui launch --as NAME`: a script that imports another trainer gets distui's face of it, and stays unchanged.

The imports of the script and of the modules beside it are rewritten when they are compiled, and nothing else: the real
library, where it is installed, stays itself for those who need it (transformers imports accelerate too).
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from distui.core.errors import UserError

FACES: dict[str, dict[str, str]] = {
    "accelerate": {"accelerate": "distui.compat.accelerate"},
    "deepspeed": {"deepspeed": "distui.compat.deepspeed"},
}
"""Name of `--as` -> package that scripts import -> distui's face of it."""

_READS_LOCAL_RANK = (b"--local_rank", b"HfArgumentParser")
_LIBRARY_FOLDERS = frozenset({"site-packages", "dist-packages"})


def check_face(name: str | None) -> None:
    """Refuse a name that `--as` does not know.

    Raises:
        UserError: with the names.
    """
    if name is not None and name not in FACES:
        import difflib

        near = difflib.get_close_matches(name, FACES, n=1)
        raise UserError(
            f"--as {name} is unknown",
            f"distui has a face of {', '.join(FACES)}",
            f"write --as {near[0]}" if near else "leave --as out for a script that uses distui or plain torch",
        )


class _Renamer(ast.NodeTransformer):
    """Renames packages in import statements, and in calls of `import_module` and `__import__`."""

    def __init__(self, renamed: dict[str, str]) -> None:
        self._renamed = renamed

    def _new(self, module: str) -> str | None:
        package, dot, rest = module.partition(".")
        face = self._renamed.get(package)
        return None if face is None else face + dot + rest

    def visit_Import(self, node: ast.Import) -> ast.AST:
        names: list[ast.alias] = []
        for alias in node.names:
            new = self._new(alias.name)
            if new is None:
                names.append(alias)
                continue
            package = alias.name.partition(".")[0]
            if alias.asname is None and "." in alias.name:
                # `import a.b` loads a.b and binds a.
                names.append(ast.copy_location(ast.alias(new, f"_{new.replace('.', '_')}"), alias))
                new = self._renamed[package]
            names.append(ast.copy_location(ast.alias(new, alias.asname or package), alias))
        node.names = names
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module and (new := self._new(node.module)):
            node.module = new
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            if isinstance(name, str) and (new := self._new(name)):
                node.args[0] = ast.copy_location(ast.Constant(new), node.args[0])
        return node


def compiled(source: bytes | str, filename: str, renamed: dict[str, str]) -> types.CodeType:
    """Return the code of `source` with packages renamed; lines and columns stay those of the file."""
    tree = ast.parse(source, filename)
    code = compile(_Renamer(renamed).visit(tree), filename, "exec", dont_inherit=True)
    assert isinstance(code, types.CodeType)
    return code


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles with packages renamed; never reads or writes a cache that plain Python would read."""

    renamed: dict[str, str]

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return compiled(self.get_data(path), path, self.renamed)


class Face(MetaPathFinder):
    """The first of the finders: takes the user's own modules to itself."""

    def __init__(self, renamed: dict[str, str], roots: Sequence[Path]) -> None:
        """`roots` are the folders whose modules are the user's; libraries below them are not."""
        self._renamed = renamed
        self._roots = [root.resolve() for root in roots]
        self._libraries = [Path(path).resolve() for path in (sysconfig.get_path("stdlib"), *site.getsitepackages())]

    def is_users(self, path: Path) -> bool:
        """Return whether a file is one of the user's own modules."""
        path = path.resolve()
        for root in self._roots:
            if path.is_relative_to(root):
                inside = path.relative_to(root).parts
                below = [library for library in self._libraries if library.is_relative_to(root) and library != root]
                return not _LIBRARY_FOLDERS & set(inside) and not any(path.is_relative_to(lib) for lib in below)
        return False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find what the path has, if it is a user's source file."""
        top = fullname.partition(".")[0]
        if top in self._renamed or top == "distui":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        if not self.is_users(Path(spec.origin)):
            return None
        loader = _Loader(fullname, spec.origin)
        loader.renamed = self._renamed
        spec.loader = loader
        return spec


def wear(name: str, target: Sequence[str]) -> dict[str, str]:
    """Make the target's own modules see distui's face `name`; returns what is renamed.

    The user's modules are those below the script's folder and the working directory (for `-m`: the module's own package
    too).
    """
    renamed = FACES[name]
    roots = [Path.cwd()]
    if target[0] == "-m":
        top = target[1].partition(".")[0]
        spec = importlib.util.find_spec(top)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            roots.insert(0, origin.parent if spec.submodule_search_locations else origin)
    else:
        roots.insert(0, Path(target[0]).resolve().parent)
    sys.meta_path.insert(0, Face(renamed, roots))
    return renamed


def with_local_rank(target: Sequence[str], local_rank: str) -> list[str]:
    """Return the target with `--local_rank=N` before its own arguments, if its source speaks of that argument.

    DeepSpeed's launcher gives it to every script; one that does not know it would stop there.
    """
    at = 2 if target[0] == "-m" else 1
    if target[0] == "-m":
        spec = importlib.util.find_spec(target[1])
        source = Path(spec.origin) if spec is not None and spec.origin is not None else None
    else:
        source = Path(target[0])
    if source is None or not any(word in source.read_bytes() for word in _READS_LOCAL_RANK):
        return list(target)
    return [*target[:at], f"--local_rank={local_rank}", *target[at:]]


def run_path(path: str, renamed: dict[str, str]) -> None:
    """Run a script as `__main__`, as `runpy.run_path` does, with packages renamed."""
    code = compiled(Path(path).read_bytes(), path, renamed)
    main = types.ModuleType("__main__")
    values: dict[str, Any] = {"__file__": path, "__cached__": None, "__loader__": None, "__spec__": None}
    main.__dict__.update(values, __package__="", __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
