"""A node of the test's own: state and runtime folders, a real daemon process, ranks that publish to it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node


def _load(stem: str) -> Any:
    # pytest's importlib mode does not put the tests' folders on sys.path.
    name = f"tests.grpc.{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Give a node without a daemon; `node.start()` starts one."""
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    (folder / "r").mkdir(mode=0o700)
    monkeypatch.setenv("DISTUI_STATE_DIR", str(folder / "s"))
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(folder / "r"))
    monkeypatch.delenv("DISTUI_JOB", raising=False)
    found: Node = _load("simulated_ranks").Node(folder)
    yield found
    found.close()
    shutil.rmtree(folder)
