"""The first code of each rank: `python -m distui.launcher.node.rank [-m] script args...`.

Sends stdout and stderr to the rank's log, opens its telemetry, and runs the script as plain Python would: as
`__main__`, with its own `sys.argv` and `sys.path[0]`. What the script raises is kept for the report.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import resource
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

from distui.core.config.schema import Config, TelemetrySection
from distui.core.config.settings import load
from distui.core.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from distui.core.paths import RunFolder, current_run, read_own, write_own
from distui.core.telemetry.after_import import after_import
from distui.launcher.compat import faces as compat
from distui.launcher.job.console import CONSOLE_ENV, ConsoleLine
from distui.launcher.job.outcome import last_step
from distui.launcher.job.processes import (
    AGENT_PID_ENV,
    die_with_parent,
    record_session,
    request_preemption,
    request_stop,
)
from distui.launcher.node.bars import Bars
from distui.launcher.node.debugging import debug_here
from distui.launcher.node.stdin import PersonWait, note_stdin
from distui.launcher.node.store import STORE_ENV, RankStore
from distui.launcher.node.streams import redirect

if TYPE_CHECKING:
    from distui.core.telemetry.source import TelemetrySource

STOP_DELAY_S = 0.3
"""For the ranks' answers to leave before the signal ends them."""

_ENDED_WELL = (EXIT_OK, EXIT_PREEMPTED)
_OWN_FILES = (__file__, compat.__file__, runpy.__file__, "<frozen runpy>")


def main() -> None:
    """Be a rank; the exit status is the script's."""
    run = current_run()
    assert run is not None, "distui.launcher.node.rank is started by distui launch"
    die_with_parent(int(os.environ[AGENT_PID_ENV]), signal.SIGKILL)
    record_session(run)
    signal.signal(signal.SIGUSR1, lambda number, frame: request_preemption(run))
    rank = int(os.environ["RANK"])
    redirect(run.rank_log(rank), marked=os.environ.get("LOCAL_RANK") == "0")
    store = RankStore(numbers) if (numbers := os.environ.pop(STORE_ENV, "")) else None
    if store is not None:
        after_import("torch.distributed", lambda module: store.serve())
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run.nccl / "rank"))  # torch adds the rank's number
    config = load(run.config, {}, environ={}).config
    if config.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch is not there yet
    if config.cluster.on_preempt == "save":
        signal.signal(signal.SIGTERM, lambda number, frame: request_preemption(run))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by which the agent ends it then; nohup has it ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
    source = _open_source(run, rank, config.telemetry)
    if source is not None:
        source.on_control("stop", lambda command: _stop_job(run))
        after_import("torch", lambda module: _record_collectives())
        after_import("tqdm.std", Bars(source).watch)
    line = ConsoleLine(int(number)) if (number := os.environ.pop(CONSOLE_ENV, "")) else None
    waits = PersonWait(source)
    if line is not None:
        note_stdin(waits, line)
    debug_here(run, rank, source, waits, line)
    asked = config.summary() if rank == 0 and config.summary() != Config().summary() else ""
    if source is not None or asked:
        _watch_optimizers(source, asked)
    after_import("accelerate.state", lambda module: _stand_beside_accelerate())
    for part in ("modeling_utils", "training_args", "trainer"):
        after_import(f"transformers.{part}", lambda module: _drive_trainer(module.__name__.rpartition(".")[2]))
    status, error = _run_script(run, rank, sys.argv[1:])
    _save_last_step(status)
    if status in _ENDED_WELL:
        _leave_group()
    if source is not None:
        source.close(0 if status in _ENDED_WELL else status, error)
    _leave(status, store)


def _leave(status: int, store: RankStore | None) -> NoReturn:
    """End the process as the interpreter would, but for tearing itself down.

    Threads of gloo that come for the GIL during the teardown are unwound through C++ that forbids it: SIGABRT,
    "terminate called without an active exception", after a script that has done all of its work.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins the script's own threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed by the script, or None: nothing is left in it
            stream.flush()
    if store is not None and status in _ENDED_WELL:
        store.outlive_others(status)
    os._exit(status)


def _record_collectives() -> None:
    """Have every collective of the script recorded, with or without an engine."""
    from distui.core.telemetry.collectives import install

    install()


def _stand_beside_accelerate() -> None:
    """Have the real Accelerate, whoever imports it, answer for this job as distui's face does."""
    from distui.compat.accelerate import beside

    beside.install(sys.modules["accelerate.state"])


def _drive_trainer(part: str) -> None:
    """Put distui's engine under the `Trainer` of the script."""
    from distui.compat.transformers import install, pretrained

    parts = {
        "modeling_utils": pretrained.install,
        "training_args": install.install_arguments,
        "trainer": install.install_trainer,
    }
    parts[part](sys.modules[f"transformers.{part}"])


def _save_last_step(status: int) -> None:
    """Write the checkpoint that the script's last steps asked for, while there is a process group; if it ended well."""
    step_end = sys.modules.get("distui.core.engine.step_end")
    if step_end is not None:
        (step_end.forget_all if status else step_end.finish_all)()


def _leave_group() -> None:
    """Destroy the process group that the script left open.

    Its threads race with the end of the interpreter: about one exit in ten of such a script is a SIGABRT, under plain
    Python too (torch 2.13, gloo).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _open_source(run: RunFolder, rank: int, settings: TelemetrySection) -> TelemetrySource | None:
    """Start telemetry where it is on. Its failure is told in the log and never stops the training."""
    if not settings.enabled:
        return None
    try:
        from distui.core.telemetry.source import open_source

        return open_source(rank, int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), run, settings)
    except Exception as error:  # noqa: BLE001  whatever it is, the script must run
        print(f"distui: no telemetry from rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _watch_optimizers(source: TelemetrySource | None, asked: str) -> None:
    """Send the steps of a script that has no engine, and tell it what of the settings (`asked`) then has no effect."""
    from distui.core.telemetry.plain_steps import watch_optimizers
    from distui.core.telemetry.source import NullSource

    watch_optimizers(source or NullSource(), asked)


def _stop_job(run: RunFolder) -> str:
    """Have the agent end the job, as Ctrl-C does; the first rank that is asked does it for all."""
    if request_stop(run):
        agent = int(os.environ[AGENT_PID_ENV])
        threading.Timer(STOP_DELAY_S, os.kill, (agent, signal.SIGTERM)).start()
    return "the job is being stopped"


def _face(run: RunFolder, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the name of `--as` that the job was started with, and the target with the arguments that it then gets."""
    try:
        spec = json.loads(read_own(run.spec))
    except FileNotFoundError:
        return None, arguments
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
        if status == EXIT_PREEMPTED:
            return status, ""
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
    try:
        _make_room(error)
        write_own(run.rank_error(rank), json.dumps(report, indent=1))
    except (OSError, ValueError) as failed:  # how the script ended counts, and is in its log
        print(f"distui: {run.rank_error(rank)} cannot be written: {failed}", file=sys.stderr)


def _make_room(error: BaseException) -> None:
    """Let a rank that failed of too many open files open those of its report."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
