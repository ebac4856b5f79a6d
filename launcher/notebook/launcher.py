"""`distui.notebook_launcher`: the same launch from a notebook's cell, for a function that is defined there."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distui.core.config.schema import Config
from distui.core.errors import EXIT_OK, RankFailed, UserError
from distui.core.paths import JOB_ENV, RunFolder, list_own, open_own, read_own, write_own

POLL_S = 0.1
LOOK_S = 1.0


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
) -> Any:
    """Run `function(*args)` on every rank and return what it returns on rank 0.

    The ranks are fresh processes: the function, and what it uses of the notebook, is sent to them by value, so a
    notebook that has already used CUDA is no obstacle. Models, optimizers and loaders are best made inside of it. The
    cell shows rank 0's output and a live table of all ranks; interrupting the kernel stops the ranks.

    `num_processes` are the ranks on this machine (default: its GPUs, or half of its cores). `settings` are keys such as
    `{"strategy.zero_stage": 2}` and win over `config`, a `distui.toml` (default: the one in the working directory).

    Raises:
        UserError: before anything is started.
        RankFailed: a rank failed; the message has its own traceback.
        KeyboardInterrupt: the kernel was interrupted; the ranks are stopped.
    """
    if os.environ.get(JOB_ENV):
        raise UserError(
            "notebook_launcher was called on a rank",
            "this process is already one of a job's ranks",
            "call the function itself here; notebook_launcher belongs into the notebook",
        )
    if not callable(function):
        raise UserError("nothing to run", f"{function!r} is no function", "notebook_launcher(train, args)")
    call = pickled_call(function, args)
    overrides = {key: _text(value) for key, value in (settings or {}).items()}
    if num_processes is not None:
        overrides["cluster.nproc"] = str(num_processes)
    overrides.setdefault("run.name", getattr(function, "__name__", "notebook"))
    return run_call(call, overrides, Path(config) if config is not None else None)


def pickled_call(function: Callable[..., Any], args: Sequence[Any]) -> bytes:
    """Return function and arguments as bytes that a fresh process can load.

    Raises: UserError, naming what cannot be sent.
    """
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps((function, tuple(args)))
    except (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{getattr(function, '__name__', 'the function')} cannot be sent to the ranks",
            f"{type(error).__name__}: {error}",
            "make what it names (a lock, a file, a connection, a generator) inside the function, not in the notebook",
        ) from error
    return data


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_call(call: bytes, overrides: dict[str, str], config_path: Path | None, face: str | None = None) -> Any:
    """Run what `pickled_call` gave on every rank, and return what rank 0 returns; `face` is the name of `--as`.

    Raises: as `notebook_launcher`.
    """
    from distui.launcher.job.launch import create_run, resolve
    from distui.launcher.job.request import LaunchRequest
    from distui.launcher.notebook.call import RESULT

    target = ["-m", "distui.launcher.notebook.call"]
    config = resolve(LaunchRequest(target, overrides, config_path, no_tui=True, face=face))
    if config.cluster.hosts:
        why, fix = f"the settings name hosts: {config.cluster.hosts}", "put the function into a script: distui launch"
        raise UserError("a notebook starts its ranks on this machine", why, fix)
    run = create_run(LaunchRequest([*target, "call.pkl"], overrides, config_path, no_tui=True, face=face), config)
    file = run.path / "call.pkl"
    with open(open_own(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as written:
        written.write(call)
    target.append(str(file))
    _name_call(run, target)
    outcome_state, status = _follow(run, target, config)
    if status != EXIT_OK:
        if outcome_state == "stopped":
            raise KeyboardInterrupt(f"the ranks were stopped; their logs are in {run.logs}")
        raise _failure(run)
    result = run.path / RESULT
    if RESULT not in list_own(run.path):
        return None
    with open(open_own(result), "rb") as returned:  # by this user's own function, into this run's own folder
        return pickle.load(returned)


def _name_call(run: RunFolder, target: list[str]) -> None:
    """Write the call's place into the run's command: it lies in the run's own folder, which only now has a name."""
    import json

    spec = json.loads(read_own(run.spec))
    write_own(run.spec, json.dumps({**spec, "command": target}, indent=1))


def _follow(run: RunFolder, target: list[str], config: Config) -> tuple[str, int]:
    """Start the ranks and show them until they have ended; return the run's state and exit status."""
    from distui.core.paths import daemon_socket
    from distui.launcher.job.announce import Announcer
    from distui.launcher.job.daemon_keeper import DaemonKeeper
    from distui.launcher.job.ending import end_line
    from distui.launcher.job.job import Job
    from distui.launcher.job.launch import start_daemon
    from distui.launcher.job.plain import LogCopy
    from distui.launcher.notebook.view import CellStream, LiveTable

    job = Job(run, target, dict(os.environ))
    started_s = time.monotonic()
    on_main_thread = threading.current_thread() is threading.main_thread()
    restored = signal.signal(signal.SIGINT, job.on_signal) if on_main_thread else None
    output = LogCopy(run.rank_log(0), CellStream())  # type: ignore[arg-type]
    table = LiveTable(run)
    try:
        socket = start_daemon(config)
        announcer = Announcer(run, socket)
        announcer.started()
        with DaemonKeeper(daemon_socket() if config.telemetry.enabled else None):
            next_look_s = time.monotonic() + LOOK_S
            while not job.wait(POLL_S):
                output.copy()
                if socket is not None and time.monotonic() >= next_look_s:
                    next_look_s = time.monotonic() + LOOK_S
                    _look(table, run)
            output.copy()
            outcome = job.finish()
            announcer.finished(outcome)
    finally:
        if job.ended() is None:  # an exception of ours: no rank outlives the cell
            job.stop()
            job.finish()
        output.close()
        if on_main_thread:
            signal.signal(signal.SIGINT, restored)
    _look(table, run)
    print(end_line(run, outcome, time.monotonic() - started_s), file=sys.stderr)
    return outcome.state, outcome.exit_status


def _look(table: Any, run: RunFolder) -> None:
    from distui.launcher.job.daemon_client import snapshot_of

    table.show(snapshot_of(run))


def _failure(run: RunFolder) -> RankFailed:
    from distui.launcher.job.ending import failure_report
    from distui.launcher.job.outcome import read_outcome

    outcome = read_outcome(run)
    if outcome is None:
        return RankFailed(f"the job failed; see {run.logs}")
    return RankFailed(failure_report(run, outcome), outcome.failed_rank)
