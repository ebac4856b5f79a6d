"""The first code of each rank: `python -m distui.launcher.rank [-m] script args...`.

Sends stdout and stderr to the rank's log, opens its telemetry, and runs the script as plain Python would: as
`__main__`, with its own `sys.argv` and `sys.path[0]`. What the script raises is kept for the report.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from distui.core.errors import UserError
from distui.core.imports import when_imported
from distui.core.paths import RunFolder, current_run, write_atomic
from distui.launcher import compat
from distui.launcher.outcome import last_step
from distui.launcher.processes import AGENT_PID_ENV, die_with_parent, record_session, request_stop
from distui.launcher.store import STORE_ENV, RankStore

if TYPE_CHECKING:
    from distui.core.telemetry.source import TelemetrySource

STOP_DELAY_S = 0.3
"""For the ranks' answers to leave before the signal ends them."""

_OWN_FILES = (__file__, compat.__file__, runpy.__file__, "<frozen runpy>")


def main() -> None:
    """Be a rank; the exit status is the script's."""
    run = current_run()
    assert run is not None, "distui.launcher.rank is started by distui launch"
    die_with_parent(int(os.environ[AGENT_PID_ENV]), signal.SIGKILL)
    record_session(run)
    rank = int(os.environ["RANK"])
    _redirect(run.rank_log(rank))
    store = RankStore(numbers) if (numbers := os.environ.pop(STORE_ENV, "")) else None
    if store is not None:
        when_imported("torch.distributed", store.serve)
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run.nccl / "rank"))  # torch adds the rank's number
    source = _open_source(run, rank)
    if source is not None:
        source.on_control("stop", lambda command: _stop_job(run))
        _watch_optimizers(source)
        when_imported("torch", _record_collectives)
    for part in ("training_args", "trainer"):
        when_imported(f"transformers.{part}", functools.partial(_drive_trainer, part))
    status, error = _run_script(run, rank, sys.argv[1:])
    if status == 0:
        _leave_group()
    if source is not None:
        source.close(status, error)
    _leave(status, store)


def _leave(status: int, store: RankStore | None) -> NoReturn:
    """End the process as the interpreter would, but for tearing itself down.

    Threads of gloo that come for the GIL during the teardown are unwound through C++ that forbids it: SIGABRT,
    "terminate called without an active exception", after a script that has done all of its work.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins the script's own threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed by the script: nothing is left in it
            stream.flush()
    if store is not None and status == 0:
        store.outlive_others(status)
    os._exit(status)


def _record_collectives() -> None:
    """Have every collective of the script recorded, with or without an engine."""
    from distui.core.collectives import install

    install()


def _drive_trainer(part: str) -> None:
    """Put distui's engine under the `Trainer` of the script."""
    from distui.compat.transformers import install

    act = install.install_trainer if part == "trainer" else install.install_arguments
    act(sys.modules[f"transformers.{part}"])


def _leave_group() -> None:
    """Destroy the process group that the script left open.

    Its threads race with the end of the interpreter: about one exit in ten of such a script is a SIGABRT, under plain
    Python too (torch 2.13, gloo).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _redirect(log: Path) -> None:
    """Let stdout and stderr of this process, C++ code and children included, go to one file in order."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _open_source(run: RunFolder, rank: int) -> TelemetrySource | None:
    """Start telemetry where it is on. Its failure is told in the log and never stops the training."""
    from distui.core.settings import load

    settings = load(run.config, {}, environ={}).config.telemetry
    if not settings.enabled:
        return None
    try:
        from distui.core.telemetry.source import open_source

        return open_source(rank, int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), run, settings)
    except Exception as error:  # noqa: BLE001  whatever it is, the script must run
        print(f"distui: no telemetry from rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _watch_optimizers(source: TelemetrySource) -> None:
    """Send the steps of a script that has no engine."""
    from distui.core.telemetry.plain_steps import watch_optimizers

    watch_optimizers(source)


def _stop_job(run: RunFolder) -> str:
    """Have the agent end the job, as Ctrl-C does; the first rank that is asked does it for all."""
    if request_stop(run):
        agent = int(os.environ[AGENT_PID_ENV])
        threading.Timer(STOP_DELAY_S, os.kill, (agent, signal.SIGTERM)).start()
    return "the job is being stopped"


def _face(run: RunFolder, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the name of `--as` that the job was started with, and the target with the arguments that it then gets."""
    if not run.spec.exists():
        return None, arguments
    spec = json.loads(run.spec.read_text(encoding="utf-8"))
    name = spec.get("face")
    if spec.get("passes_local_rank"):
        arguments = compat.with_local_rank(arguments, os.environ["LOCAL_RANK"])
    return (str(name) if name else None), arguments


def _run_script(run: RunFolder, rank: int, arguments: list[str]) -> tuple[int, str]:
    """Run the target and return its exit status, and its error as `Type: message` or an empty text."""
    try:
        face, arguments = _face(run, arguments)
        if arguments[0] == "-m":
            if face is not None:
                compat.wear(face, arguments)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            if face is not None:
                compat.run_path(arguments[0], compat.wear(face, arguments))
            else:
                runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "interrupted"
    except SystemExit as error:
        status = _exit_status(error)
        if status:
            _keep(run, rank, error, _trimmed(error.__traceback__))
        return status, f"sys.exit({status})" if status else ""
    except BaseException as error:  # noqa: BLE001  as the interpreter does: told, kept, exit 1
        own = _trimmed(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(own), own)
        _keep(run, rank, error, own)
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _trimmed(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the script's first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace


def _keep(run: RunFolder, rank: int, error: BaseException, trace: TracebackType | None) -> None:
    """Write the rank's error file, for the report and for whoever looks at the run later."""
    report = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "type": type(error).__name__,
        "message": str(error),
        "fix": error.fix if isinstance(error, UserError) else "",
        "traceback": "".join(traceback.format_exception(type(error), error, trace)),
        "step": last_step(run, rank),
        "time_s": time.time(),
    }
    write_atomic(run.rank_error(rank), json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
