"""`distui.notebook_launcher` from a real Jupyter kernel: results, the live table, errors of ranks, interrupts."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import distui
from distui.core.errors import RankFailed, UserError

SETUP = """
import threading
import distui
import torch
from torch import nn

scale = 3.0

def train(num_steps, lr=0.1):
    engine = distui.Engine()
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    for step in range(num_steps):
        x = torch.full((2, 4), float(engine.process_index))
        loss = model(x).square().mean() * scale
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    engine.print("ranks:", engine.num_processes)
    return {"stage": engine.config.strategy.zero_stage, "ranks": engine.num_processes, "model": model}
"""


@pytest.fixture(scope="module")
def client() -> Iterator[NotebookClient]:
    """Give a client whose kernel, one for all tests, runs in folders of their own."""
    monkeypatch = pytest.MonkeyPatch()
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    (folder / "r").mkdir(mode=0o700)
    for name, value in {
        "DISTUI_STATE_DIR": str(folder / "s"),
        "DISTUI_RUNTIME_DIR": str(folder / "r"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(distui.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DISTUI_JOB", raising=False)
    found = NotebookClient(nbformat.v4.new_notebook(), timeout=180, kernel_name="python3", resources={})
    found.create_kernel_manager()
    found.start_new_kernel(cwd=str(folder))
    found.start_new_kernel_client()
    yield found
    found._cleanup_kernel()
    monkeypatch.undo()
    shutil.rmtree(folder, ignore_errors=True)


def _run(client: NotebookClient, source: str) -> list[Any]:
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return list(cell.outputs)


def _text(outputs: list[Any], kind: str, name: str = "") -> str:
    found = [output for output in outputs if output.output_type == kind and (not name or output.get("name") == name)]
    return "".join(output.text if kind == "stream" else output.data["text/plain"] for output in found)


def test_a_function_of_the_notebook_trains(client: NotebookClient) -> None:
    _run(client, SETUP)
    outputs = _run(client, 'distui.notebook_launcher(train, (3,), 2, settings={"strategy.zero_stage": 2})')
    assert "ranks: 2" in _text(outputs, "stream", "stdout")
    assert "'ranks': 2" in _text(outputs, "execute_result") and "'stage': 2" in _text(outputs, "execute_result")
    table = _text(outputs, "display_data")
    assert "ZeRO-2" in table and "2 ranks" in table and "finished" in table
    html = next(output.data["text/html"] for output in outputs if output.output_type == "display_data")
    assert html.startswith("<pre")


def test_the_error_of_a_rank_reaches_the_cell(client: NotebookClient) -> None:
    broken = (
        "import threading, distui\ndef broken():\n"
        "    if distui.Engine().process_index == 1:\n        raise ValueError('bad batch 17')"
    )
    with pytest.raises(CellExecutionError) as error:
        _run(client, f"{broken}\ndistui.notebook_launcher(broken, num_processes=2)")
    assert "RankFailed" in str(error.value) and "rank 1 failed" in str(error.value)
    assert "ValueError: bad batch 17" in str(error.value)

    with pytest.raises(CellExecutionError, match="cannot be sent to the ranks"):
        _run(client, "lock = threading.Lock()\ndistui.notebook_launcher(lambda: lock.acquire(), num_processes=1)")


def test_accelerates_launcher_starts_fresh_ranks_and_raises_what_elastic_raises(client: NotebookClient) -> None:
    source = (
        "from distui.compat.accelerate import Accelerator, PartialState, notebook_launcher\n"
        "own = Accelerator()  # no obstacle: nothing is forked\n"
        "def broken(batch):\n"
        "    state = PartialState()\n    state.print('precision', Accelerator().mixed_precision)\n"
        "    state.wait_for_everyone()  # so that it is printed before the others are ended\n"
        "    if state.process_index == 1:\n        raise ValueError(f'bad batch {batch}')\n"
        "    state.wait_for_everyone()\n"
    )
    with pytest.raises(CellExecutionError) as error:
        _run(client, f"{source}notebook_launcher(broken, (17,), num_processes=2, mixed_precision='bf16')")
    assert "ChildFailedError" in str(error.value) and "ValueError: bad batch 17" in str(error.value)
    assert "precision bf16" in _text(client.nb.cells[-1].outputs, "stream", "stdout")


def test_interrupting_the_kernel_stops_the_ranks(client: NotebookClient) -> None:
    _run(client, "import distui, time, sys")
    source = (
        "def wait():\n    print('waiting', flush=True)\n    time.sleep(1000)\n"
        "distui.notebook_launcher(wait, num_processes=1)"
    )
    interrupted = threading.Event()

    def interrupt_when_waiting(cell: Any, cell_index: int) -> None:
        def look() -> None:
            while not any("waiting" in output.get("text", "") for output in cell.outputs):
                if interrupted.wait(0.1):
                    return
            assert client.km is not None and client.km.provisioner is not None
            os.kill(int(getattr(client.km.provisioner, "pid", 0)), signal.SIGINT)

        threading.Thread(target=look, daemon=True).start()

    client.on_cell_execute = interrupt_when_waiting
    try:
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            _run(client, source)
    finally:
        interrupted.set()


def test_what_is_refused_without_starting_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is no function"):
        distui.notebook_launcher("train")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be sent"):
        distui.notebook_launcher(print, (threading.Lock(),))
    with pytest.raises(UserError, match="whole number"):
        distui.notebook_launcher(print, settings={"cluster.nproc": "many"})
    monkeypatch.setenv("DISTUI_JOB", "/somewhere")
    with pytest.raises(UserError, match="called on a rank"):
        distui.notebook_launcher(print)
    assert issubclass(RankFailed, Exception)
