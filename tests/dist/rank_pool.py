"""Runs a test's function on several ranks: warm worker processes, a fresh gloo group for every call.

The file is both the pool (in pytest) and, run as a script, the worker. A worker imports torch once and then serves
calls until its connection closes. What a call sees is what torchrun would set (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE), the test's `DISTUI_*` environment, one thread, generators seeded with 0, and warnings as errors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

TIMEOUT_S = 150.0
GROUP_TIMEOUT_S = 60.0


class RunRanks(Protocol):
    """`run_ranks(function, world_size, *args)`: the fixture's type."""

    def __call__(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Return what each rank's `function(*args)` returned, by rank."""


class RankTimeout(Exception):
    """A call did not end in time; the message holds every unfinished rank's stacks."""


class RemoteTraceback(Exception):
    """The traceback of a rank, shown as the cause of its exception."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker:
    """A process that serves calls."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self.stacks = Path(tempfile.mkstemp(dir=folder, suffix=".stacks")[1])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(self.stacks)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        self.connection = Connection(ours.detach())

    def dump_stacks(self) -> str:
        """Return the Python stacks of all threads of a worker that does not answer."""
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while not self.stacks.stat().st_size and time.monotonic() < deadline and self.process.poll() is None:
            wait([self.connection], 0.05)
        return self.stacks.read_text()

    def end(self, kill: bool) -> None:
        """Close the connection, which ends an idle worker; `kill` one that is not."""
        self.connection.close()
        if kill:
            self.process.kill()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _is_echo(failure: tuple[BaseException, str]) -> bool:
    """Tell a rank that only lost its connection to the one that failed."""
    return isinstance(failure[0], RuntimeError) and "gloo" in str(failure[0])


class RankPool:
    """Warm workers of a test session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: list[Worker] = []
        self._num_calls = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Run a module-level `function(*args)` on `world_size` ranks; return what each returned, by rank.

        Raises: the first rank's exception, with its traceback as the cause; RankTimeout with stacks.
        """
        try:
            return self._run(function, world_size, *args, timeout_s=timeout_s)
        except ConnectionAbortedError:  # nothing of the call has run; a port was given to somebody else meanwhile, say
            self.close(kill=True)
            return self._run(function, world_size, *args, timeout_s=timeout_s)

    def _run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float) -> list[Any]:
        while len(self._workers) < world_size:
            self._workers.append(Worker(self._folder))
        self._num_calls += 1
        store = self._folder / f"store{self._num_calls}"
        payload = pickle.dumps(args)
        environ = {name: value for name, value in os.environ.items() if name.startswith("DISTUI_")}
        workers = self._workers[:world_size]
        call = (str(Path(function.__code__.co_filename)), function.__module__, function.__qualname__, payload)
        for rank, worker in enumerate(workers):
            worker.connection.send_bytes(pickle.dumps((*call, rank, world_size, str(store), environ)))
        try:
            return self._collect(workers, timeout_s)
        finally:
            store.unlink(missing_ok=True)

    def _collect(self, workers: list[Worker], timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[BaseException, str]] = []
        deadline = time.monotonic() + timeout_s
        while len(results) < len(workers):
            waiting = [worker.connection for rank, worker in enumerate(workers) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                try:
                    ok, results[rank] = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok = False
                    results[rank] = (ChildProcessError(f"rank {rank} died with status {worker.process.wait()}"), "")
                if not ok:
                    failures.append(results[rank])
                    # The others may wait for the rank that failed; those that fail too report at once.
                    deadline = min(deadline, time.monotonic() + 1.0)
        unfinished = [rank for rank in range(len(workers)) if rank not in results]
        stacks = "\n".join(f"--- rank {rank}\n{workers[rank].dump_stacks()}" for rank in unfinished)
        if failures:
            if unfinished or any(worker.process.poll() is not None for worker in workers):
                self.close(kill=True)
            error, text = min(failures, key=_is_echo)
            raise error from RemoteTraceback(f"{text}\n{stacks}")
        if unfinished:
            self.close(kill=True)
            raise RankTimeout(f"ranks {unfinished} did not end within {timeout_s} s\n{stacks}")
        return [results[rank] for rank in range(len(workers))]

    def close(self, kill: bool = False) -> None:
        """End all workers; the next call starts new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.end(kill)


# ---- the worker ---------------------------------------------------------------------------------------------------


def _load(path: str, module_name: str, qualname: str) -> Callable[..., Any]:
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Under the test's own name, so that its classes can travel in arguments and results.
        sys.modules[module_name] = module
        # Packages of that name, in whose folders the test finds what it imports from its neighbours.
        packages = list(itertools.accumulate(module_name.split(".")[:-1], "{}.{}".format))
        for package, folder in zip(reversed(packages), Path(path).parents, strict=False):
            sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(folder)]
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    found: Any = module
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


@contextlib.contextmanager
def _as_rank(rank: int, world_size: int, store: str, environ: dict[str, str]) -> Iterator[None]:
    import random
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    before = dict(os.environ)
    for name in before:
        if name.startswith("DISTUI_"):
            del os.environ[name]
    os.environ.update(environ)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.manual_seed(0)
    random.seed(0)
    try:
        if world_size > 1:
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=GROUP_TIMEOUT_S),
                )
                dist.barrier()
            except RuntimeError as error:
                raise ConnectionAbortedError(f"the ranks have not found each other: {error}") from error
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Guards may run slower")  # compiled code, on Python 3.13.0
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def constants_kept() -> Iterator[None]:
    """Put distui's constants back that a call sets: the next one may have ranks beside these that never set them."""
    ours = [vars(module) for name, module in sys.modules.copy().items() if name.startswith("distui.")]
    before = [{name: value for name, value in names.items() if name.isupper()} for names in ours]
    try:
        yield
    finally:
        for names, constants in zip(ours, before, strict=True):
            names.update(constants)


def _report(error: BaseException) -> tuple[BaseException, str]:
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an exception's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}"), text
    return error, text


def serve(connection: Connection) -> None:
    """Serve calls until the connection closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            path, module_name, qualname, payload, rank, *place = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # Process groups hang on engines, which refer to themselves, and each gloo group has a thread that looks a
        # hundred times a second whether there is something to do. By now all ranks have ended the call before, so that
        # nobody loses a connection that it still needs. What is left is not looked at again.
        gc.collect()
        gc.freeze()
        try:
            with _as_rank(rank, *place):
                function = _load(path, module_name, qualname)
                with constants_kept():
                    reply = pickle.dumps((True, function(*pickle.loads(payload))))
        except BaseException as error:  # noqa: BLE001 - pytest.fail and SystemExit are reported as well
            reply = pickle.dumps((False, _report(error)))
        connection.send_bytes(reply)


if __name__ == "__main__":
    # The script's folder would otherwise shadow modules of the same name as a test file.
    sys.path.pop(0)
    with open(sys.argv[2], "w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=True)
        serve(Connection(int(sys.argv[1])))
