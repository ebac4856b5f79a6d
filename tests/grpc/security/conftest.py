"""Runs that mean harm, and another user who plants them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.grpc.security.hostile import Stranger

GRPC_TESTS = Path(__file__).parents[1]

# pytest's importlib mode does not put the tests' folders on sys.path.
for _name in ("simulated_ranks", "security.hostile"):
    _module = f"tests.grpc.{_name}"
    if _module not in sys.modules:
        _path = GRPC_TESTS / f"{_name.replace('.', '/')}.py"
        _spec = importlib.util.spec_from_file_location(_module, _path)
        assert _spec is not None and _spec.loader is not None
        sys.modules[_module] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_module])


@pytest.fixture(scope="session")
def stranger() -> Iterator[Stranger]:
    """Give another user of this machine; only root can add one."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("only root can add a user to this machine")
    yield from sys.modules["tests.grpc.security.hostile"].make_stranger()
