"""Refusing what a face does not offer: importable, and raising with the way around where it is used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from distui.core.errors import UserError


class NotOffered(UserError, NotImplementedError):
    """A part of another trainer's API that distui does not offer; the fix is the way around."""

    def __str__(self) -> str:
        """Return also the way around: a script's traceback shows nothing else."""
        return f"{self.what}: {self.why}; instead, {self.fix}"


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


class RefusedModules:
    """The last of the finders: names the way around for a module of `library` that its face does not have."""

    def __init__(self, face: str, library: str, ways: Mapping[str, str], page: str) -> None:
        """`ways` holds the way around by the module's name without the library's."""
        self.face, self._library, self._ways, self._page = face, library, ways, page

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing; raise for a module of the face that no other finder has."""
        if not name.startswith(f"{self.face}."):
            return
        module = name.removeprefix(f"{self.face}.")
        parts = module.split(".")
        keys = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        way = next((self._ways[key] for key in keys if key in self._ways), f"see {self._page}")
        raise ModuleNotFoundError(f"distui does not offer {self._library}.{module}: {way}", name=name)


def refuse_modules(face: str, library: str, ways: Mapping[str, str], page: str) -> None:
    """Make imports of modules that the face does not have say so."""
    if not any(getattr(finder, "face", None) == face for finder in sys.meta_path):
        sys.meta_path.append(RefusedModules(face, library, ways, page))
