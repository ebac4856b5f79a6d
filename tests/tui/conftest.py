"""A run that is the same each time, and a daemon that tells of it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon


def _load(stem: str) -> Any:
    # pytest's importlib mode does not put the tests' folders on sys.path.
    name = f"tests.tui.{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for _stem in ("sample_run", "fake_daemon", "watching"):
    _load(_stem)


@pytest.fixture(autouse=True)
def still_cursors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no cursor blink from the start: one that is stopped later stays hidden, if it has been mounted by then."""
    from textual.widgets import Input

    monkeypatch.setattr(vars(Input)["cursor_blink"], "_default", False)


@pytest.fixture
def sample() -> Any:
    """Give the module that makes a run's data."""
    return _load("sample_run")


@pytest.fixture
async def daemon(sample: Any) -> AsyncIterator[FakeDaemon]:
    """Give a daemon that answers and has told nothing yet, with the logs of 8 ranks."""
    found: FakeDaemon = _load("fake_daemon").FakeDaemon()
    found.logs = {rank: sample.log_text(rank) for rank in range(8)}
    await found.start()
    yield found
    await found.close()


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the clocks on the screens to UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
