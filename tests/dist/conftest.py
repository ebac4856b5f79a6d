"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.dist.rank_pool import RankPool, RunRanks


def _load_rank_pool() -> Any:
    # pytest's importlib mode does not put the tests' folders on sys.path.
    name = "tests.dist.rank_pool"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("rank_pool.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Give the session's warm worker processes."""
    pool = _load_rank_pool().RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close(kill=True)


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> RunRanks:
    """Give `run_ranks(function, world_size, *args)`: a module-level function's results on N gloo ranks."""
    return rank_pool.run


@pytest.fixture(autouse=True)
def constants_kept() -> Iterator[None]:
    """Put distui's constants back that a test sets in this process, as the ranks do in theirs."""
    with _load_rank_pool().constants_kept():
        yield
