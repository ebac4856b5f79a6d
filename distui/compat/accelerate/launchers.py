"""Starting ranks from a notebook or a test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered, refuse_argument
from distui.compat.accelerate.state import AcceleratorState
from distui.core.errors import RankFailed, UserError
from distui.core.paths import JOB_ENV, RunFolder, current_run


class _Call:
    """What a rank runs: the function, with the environment of its face of Accelerate."""

    def __init__(self, function: Callable[..., Any], environ: dict[str, str], forked: bool = False) -> None:
        self.function, self.environ, self.forked = function, environ, forked
        self.__name__ = self.__qualname__ = getattr(function, "__name__", "function")  # elastic asks for it

    def __call__(self, *args: Any) -> None:
        os.environ.update(self.environ, FORK_LAUNCHED="1")
        if self.forked:
            os.environ.pop(JOB_ENV, None)  # the ranks of a function are no ranks of the job that it runs in
        AcceleratorState._reset_state(True)
        self.function(*args)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Change this process's environment for what is started inside: it is no part of a job that we may be a rank of."""
    before = dict(os.environ)
    os.environ.pop(JOB_ENV, None)
    # The script's own modules: the function may name them.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], before.get("PYTHONPATH", "")]))
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    num_processes: int,
    environ: dict[str, str],
    cluster: dict[str, Any] | None = None,
    max_restarts: int = 0,
) -> None:
    """Run the function on fresh processes, as `distui.notebook_launcher` does; forked where only a fork can share."""
    from distui.launcher.notebook.launcher import pickled_call, run_call

    try:
        call = pickled_call(_Call(function, environ), args)
    except UserError as error:
        _fork(function, args, num_processes, environ, error, max_restarts)
        return
    overrides = {"cluster.nodes": "1", "cluster.node_rank": "0", "cluster.master_port": "0"}
    overrides |= {f"cluster.{key}": str(value) for key, value in (cluster or {}).items()}
    overrides |= {"cluster.nproc": str(num_processes), "run.name": getattr(function, "__name__", "notebook")}
    outer = current_run()
    config = outer.config if outer is not None else None
    face = _face(outer)
    for left in reversed(range(max_restarts + 1)):
        try:
            with _environment(environ):
                run_call(call, overrides, config, face)
            return
        except RankFailed as error:
            if not left:
                raise _child_failed(getattr(function, "__name__", "function"), error) from error


def _face(outer: RunFolder | None) -> str | None:
    """Return the name of `--as` of the job that this process is a rank of."""
    if outer is None or not outer.spec.exists():
        return None
    face = json.loads(outer.spec.read_text(encoding="utf-8")).get("face")
    return str(face) if face else None


def _child_failed(name: str, error: RankFailed) -> Exception:
    """Return what elastic raises, which scripts written for Accelerate catch, with distui's report in it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    rank = error.rank or 0
    failure = ProcessFailure(local_rank=rank, pid=0, exitcode=1, error_file="")
    failure.message = str(error)
    return ChildFailedError(name, {rank: failure})


def _fork(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    num_processes: int,
    environ: dict[str, str],
    why: UserError,
    max_restarts: int,
) -> None:
    """Run what cannot be sent to another process, such as a queue among the arguments, on forks of this one."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if AcceleratorState._shared_state:
        raise ValueError(
            "To launch a multi-process training from your notebook, the `Accelerator` should only be initialized "
            f"inside your training function. Restart your notebook, or send no such argument: {why.why}"
        )
    if torch.cuda.is_initialized():
        raise UserError(
            why.what,
            f"{why.why}; and CUDA, which this process has used, does not survive a fork",
            f"{why.fix}; or restart the notebook, and touch the GPU only inside the training function",
        )
    print(f"distui: ranks are forked, since {why.what}", file=sys.stderr)
    sys.stdout.flush()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="none",
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    elastic_launch(config=config, entrypoint=_Call(function, environ, forked=True))(*args)


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = "0",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: dict[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Run `function(*args)` on ranks, and return when all have ended; the cell shows rank 0's output and a live table.

    Ranks are fresh processes, so a notebook may have used its GPU or an Accelerator before. Without `num_processes`
    there is a rank a GPU, or one, which is this process. The ranks of one machine meet on a port of their own, so
    `use_port` and `rdzv_*` count for several nodes at most. The ranks are started again, all, `max_restarts` times.

    Raises: ChildFailedError with the error of the rank that failed first.
    """
    if str(mixed_precision).lower() not in ("no", "fp16", "bf16"):
        raise refuse_argument("notebook_launcher", "mixed_precision", mixed_precision, "use no, fp16 or bf16")
    if log_line_prefix_template is not None:
        way = "each rank has a log of its own in the run's folder"
        raise refuse_argument("notebook_launcher", "log_line_prefix_template", log_line_prefix_template, way)
    if num_nodes > 1 and rdzv_backend != "static":
        way = "leave it out, and give master_addr, use_port and node_rank on every node"
        raise refuse_argument("notebook_launcher", "rdzv_backend", rdzv_backend, way)
    if num_processes is None:
        num_processes = max(1, torch.cuda.device_count())
    environ = {} if mixed_precision == "no" else {"ACCELERATE_MIXED_PRECISION": str(mixed_precision)}
    if num_processes == 1 and num_nodes == 1:
        before = dict(os.environ)
        os.environ.update(environ)
        try:
            function(*args)
        finally:
            for key in environ:
                os.environ.pop(key)
            os.environ.update({key: before[key] for key in environ if key in before})
        return
    cluster: dict[str, Any] = {}
    if num_nodes > 1:
        address, _, port = rdzv_endpoint.partition(":") if rdzv_endpoint else (master_addr, "", use_port)
        cluster = {"nodes": num_nodes, "node_rank": node_rank, "master_addr": address, "master_port": port}
    _start(function, args, num_processes, environ, cluster, max_restarts)


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> None:
    """Run `function(*args)` on ranks on the CPU."""
    _start(function, args, num_processes, {"ACCELERATE_USE_CPU": "yes", "CUDA_VISIBLE_DEVICES": ""})


def __getattr__(name: str) -> Any:
    return offered("accelerate.launchers", {}, name)
