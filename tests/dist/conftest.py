"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.dist.ranks import RankPool, RunRanks


def _load_ranks() -> Any:
    # pytest's importlib mode does not put the tests' folders on sys.path.
    name = "tests.dist.ranks"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("ranks.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Give the session's warm worker processes."""
    pool = _load_ranks().RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close(kill=True)


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> RunRanks:
    """Give `run_ranks(function, world_size, *args)`: a module-level function's results on N gloo ranks."""
    return rank_pool.run
