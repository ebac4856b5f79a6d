"""Prints how many public names of Accelerate and DeepSpeed distui's faces refuse, and which.

    python benchmarks/compat_names.py [--list]

Public are the names of `accelerate`, `accelerate.utils` and `deepspeed`, as installed here; without them, those that
the faces know. What the installed Accelerate does by itself counts as offered only where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import typing
from importlib.util import find_spec
from typing import Any

from distui.compat.accelerate import refusals as of_accelerate
from distui.compat.deepspeed import refusals as of_deepspeed
from distui.compat.not_offered import is_refused

PLACES = {"accelerate": ("accelerate", "accelerate.utils"), "deepspeed": ("deepspeed",)}


def names(place: str, known: dict[str, str]) -> list[str]:
    """Return the public names of a module, its submodules left out."""
    if find_spec(place.partition(".")[0]) is None:
        return sorted(known)
    module = importlib.import_module(place)
    kept = [name for name in vars(module) if not name.startswith("_") and name not in vars(typing)]
    return sorted(name for name in kept if type(getattr(module, name)).__name__ != "module")


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    tables: dict[str, Any] = {"accelerate": of_accelerate, "deepspeed": of_deepspeed}
    for library, places in PLACES.items():
        known = tables[library].NAMES
        counted, refused, unknown = 0, set(), set()
        for place in places:
            face = importlib.import_module(f"distui.compat.{place}")
            for name in names(place, known):
                counted += 1
                try:
                    if is_refused(getattr(face, name)):
                        refused.add(name)
                except AttributeError:
                    unknown.add(name)
        installed = "installed" if find_spec(library) is not None else "not installed"
        print(f"{library} ({installed}): {counted} public names, {len(refused)} refused, {len(unknown)} not there")
        if arguments.list:
            for name in sorted(refused):
                print(f"  {name}: {known[name] if name in known else tables[library].MODULES.get(name, '')}")
            for name in sorted(unknown):
                print(f"  {name}: not there")


if __name__ == "__main__":
    main()
