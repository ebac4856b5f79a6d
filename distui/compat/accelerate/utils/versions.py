"""Comparing versions of libraries."""

from __future__ import annotations

import importlib.metadata
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

_OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        raise ValueError(f"{version!r} is no version")
    parts = [int(part) for part in numbers[0].split(".")]
    return tuple(parts + [0] * (4 - len(parts)))


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Return whether a library's (or a given) release is `operation` `requirement_version`; suffixes do not count."""
    if operation not in _OPERATIONS:
        raise ValueError(f"`operation` must be one of {list(_OPERATIONS)}, received {operation}")
    text = str(library_or_version)
    version = text if re.match(r"\d", text) else importlib.metadata.version(text)
    return _OPERATIONS[operation](_release(version), _release(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Return whether torch's release is `operation` `version`."""
    return compare_versions(torch.__version__, operation, version)
