"""`deepspeed.utils.z3_leaf_module`: marks on modules. The engine gathers whole blocks, so that it needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def z3_leaf_module(model: nn.Module) -> bool:
    """Return whether a module is marked as a leaf."""
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are marked as leaves."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark a module, or take its mark away."""
    model._z3_leaf = flag  # type: ignore[assignment]


def _is_of(module: nn.Module, kinds: Sequence[Any]) -> bool:
    name = type(module).__name__
    names = (name, f"{type(module).__module__}.{type(module).__qualname__}")
    return any(kind in names if isinstance(kind, str) else isinstance(module, kind) for kind in kinds)


def _mark_classes(model: nn.Module, kinds: Sequence[Any], flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    if not all(isinstance(kind, (type, str)) for kind in kinds):
        raise AssertionError(f"leaf_module_classes must be a list of types or names, got {kinds}")
    found = [module for module in model.modules() if _is_of(module, kinds)]
    if not found and raise_if_not_found:
        raise ValueError(f"No modules of type {kinds} found in model {model}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules of these classes or class names, and return them. Raises: ValueError where there is none."""
    return _mark_classes(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the marks away, and return the modules that had them."""
    return _mark_classes(model, leaf_module_classes, False, raise_if_not_found)


def _mark_named(
    model: nn.Module, wanted: Sequence[str], flag: bool, must: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    found: dict[int, nn.Module] = {}
    missing = []
    for want in wanted:
        modules = [module for name, module in model.named_modules() if fits(name, want)]
        found.update({id(module): module for module in modules})
        missing += [] if modules else [want]
    if missing and must:
        raise ValueError(f"No modules named {missing} found in model {model}")
    for module in found.values():
        set_z3_leaf_module(module, flag)
    return list(found.values()), missing


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their full names; return them, and the names that fit none."""
    return _mark_named(model, module_names, flag, raise_if_not_found, lambda name, want: name == want)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by the ends of their names; return them, and the ends that fit none."""
    return _mark_named(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)
