"""Environment variables as values."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")

logger = logging.getLogger(__name__)


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Return 1 or 0 (or with `to_bool` True or False) for yes and no in their usual spellings."""
    text = str(value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError(f"invalid truth value {text}")
    return text in _TRUE if to_bool else int(text in _TRUE)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Return a variable as True or False."""
    return bool(str_to_bool(os.environ.get(key, str(default)), to_bool=True))


def parse_choice_from_env(key: str, default: Any = "no") -> Any:
    """Return a variable as text, or `default`."""
    return str(os.environ.get(key, str(default)))


def get_int_from_env(env_keys: list[str], default: int) -> int:
    """Return the first of the variables that is set, as a number."""
    for key in env_keys:
        if (value := int(os.environ.get(key, "-1"))) >= 0:
            return value
    return default


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Return which of the libraries are imported."""
    import sys

    return [name for name in library_names if name in sys.modules]


def convert_dict_to_env_variables(current_env: dict[str, str]) -> list[str]:
    """Return `key=value` lines, without those that a shell would read otherwise, of which it warns."""
    lines = []
    for key, value in current_env.items():
        if key and value and not set(";\n<> ") & set(key + value):
            lines.append(f"{key}={value}\n")
        else:
            logger.warning("Skipping %s=%s: it contains forbidden characters or misses a value", key, value)
    return lines


def get_current_device_type() -> tuple[str, str]:
    """Return the kind of device, and what `DistributedType` calls several of them."""
    return ("cuda", "MULTI_GPU") if torch.cuda.is_available() else ("cpu", "MULTI_CPU")


@contextmanager
def clear_environment() -> Iterator[None]:
    """Empty the environment inside the block."""
    before = os.environ.copy()
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Set variables (their names in capitals) inside the block."""
    before = {key.upper(): os.environ.get(key.upper()) for key in kwargs}
    os.environ.update({key.upper(): str(value) for key, value in kwargs.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorate a function, or the tests of a class, to leave the ACCELERATE_* variables as they were."""
    if isinstance(func_or_cls, type):
        _purge_tests(func_or_cls)
        _purge_subclasses(func_or_cls)
        return func_or_cls
    function: Callable[..., Any] = func_or_cls

    @wraps(function)
    def purged(*args: Any, **kwargs: Any) -> Any:
        before = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
        try:
            return function(*args, **kwargs)
        finally:
            for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
                del os.environ[key]
            os.environ.update(before)

    return purged


def _purge_tests(kind: type) -> None:
    for name, value in list(vars(kind).items()):
        if name.startswith("test") and callable(value):
            setattr(kind, name, purge_accelerate_environment(value))


def _purge_subclasses(kind: Any) -> None:
    before = kind.__init_subclass__

    def purge(cls: type, **kwargs: Any) -> None:
        before(**kwargs)
        _purge_tests(cls)

    kind.__init_subclass__ = classmethod(purge)


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.environment", {}, name)
