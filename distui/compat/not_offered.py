"""Refusing what a face does not offer: importable, and raising with the way around where it is used."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from distui.core.errors import UserError


class NotOffered(UserError, NotImplementedError):
    """A part of another trainer's API that distui does not offer; the fix is the way around."""

    def __str__(self) -> str:
        """Return also the way around: a script's traceback shows nothing else."""
        return f"{self.what}: {self.why}; instead, {self.fix}"


def refuse_pipeline(strategy: Any, face: str) -> None:
    """Refuse a pipeline where the script calls its model once a micro-batch. Raises: NotOffered."""
    if (size := strategy.pipeline_parallel) > 1:
        raise NotOffered(
            f"strategy.pipeline_parallel={size} under {face} is not offered by distui",
            "the script calls its model once a micro-batch, and a pipeline runs those of a step in one call",
            "use distui.Engine in the script, or a deepspeed.pipe.PipelineModule, or set strategy.pipeline_parallel to "
            "1",
        )


class NotInstalled(NotOffered, ImportError):
    """A part of another trainer's API that needs a library which is not here."""


class _Refused(type):
    """The metaclass of a refused name: importing it is fine, using it is not."""

    library: str
    what: str
    way: str

    def _refuse(cls) -> NotOffered:
        return NotOffered(f"{cls.library}'s {cls.what} is not offered by distui", "it would do nothing here", cls.way)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise cls._refuse()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise cls._refuse()


def refused_name(library: str, name: str, way: str) -> Any:
    """Return what stands for `name`: it can be imported and asked about by `isinstance`, and raises when it is used.

    So a script that only mentions it in a branch of its own runs, and one that needs it stops with the reason.
    """
    return _Refused(name, (), {"library": library, "what": name, "way": way})


def is_refused(value: Any) -> bool:
    """Return whether a name of a face stands for what is not offered."""
    return isinstance(value, _Refused)


class RefusedModules(Loader):
    """The last of the finders: for a module of `library` that its face does not have, one whose names refuse."""

    def __init__(
        self,
        face: str,
        library: str,
        ways: Mapping[str, str],
        page: str,
        theirs: Collection[str] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`ways` holds the way around by the module's own name; `theirs` are taken from the library.

        `aliases` are other paths of the face's own modules.
        """
        self.face, self._library, self._ways, self._page, self._theirs = face, library, ways, page, theirs
        self._aliases = aliases or {}

    def _way(self, module: str) -> str | None:
        parts = module.split(".")
        keys = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return next((self._ways[key] for key in keys if key in self._ways), None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find what is refused, so that scripts can import it; raise for what the library does not have either."""
        if not name.startswith(f"{self.face}."):
            return None
        module = name.removeprefix(f"{self.face}.")
        if self._way(module) is None and module not in self._aliases:
            raise ModuleNotFoundError(f"distui does not offer {self._library}.{module}: see {self._page}", name=name)
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Make every name of the module one that raises where it is used."""
        path = module.__name__.removeprefix(f"{self.face}.")
        way = self._way(path)
        real: Any = None
        if path in self._aliases:
            real = import_module(f"{self.face}.{self._aliases[path]}")
        elif path in self._theirs and find_spec(self._library) is not None:
            real = import_module(f"{self._library}.{path}")

        def refuse(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if real is not None:
                return getattr(real, name)
            return refused_name(self._library, f"{path}.{name}", str(way))

        module.__dict__.update(__getattr__=refuse, __doc__=f"Not offered: {way}")


def refuse_modules(
    face: str,
    library: str,
    ways: Mapping[str, str],
    page: str,
    theirs: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Make imports of modules that the face does not have say so; `theirs` are the installed library's own."""
    if not any(getattr(finder, "face", None) == face for finder in sys.meta_path):
        sys.meta_path.append(RefusedModules(face, library, ways, page, theirs, aliases))
