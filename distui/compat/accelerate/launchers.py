"""Starting ranks from a notebook or a test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from distui.compat.accelerate.refusals import refuse_argument
from distui.compat.accelerate.state import AcceleratorState
from distui.core.errors import UserError
from distui.core.paths import JOB_ENV


class _Call:
    """What a rank runs: the function, with the environment of its face of Accelerate."""

    def __init__(self, function: Callable[..., Any], environ: dict[str, str]) -> None:
        self.function, self.environ = function, environ
        self.__name__ = self.__qualname__ = getattr(function, "__name__", "function")  # elastic asks for it

    def __call__(self, *args: Any) -> None:
        os.environ.update(self.environ, FORK_LAUNCHED="1")
        os.environ.pop(JOB_ENV, None)  # the ranks of a function are no ranks of the job that it runs in
        AcceleratorState._reset_state(True)
        self.function(*args)


def _start(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    num_processes: int,
    environ: dict[str, str],
    **options: Any,
) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if AcceleratorState._shared_state:
        raise ValueError(
            "To launch a multi-process training from your notebook, the `Accelerator` should only be initialized "
            "inside your training function. Restart your notebook and make sure no cells initializes an "
            "`Accelerator`."
        )
    if torch.cuda.is_initialized():
        raise UserError(
            "this process has used its GPU already",
            "ranks are forked from it, and CUDA does not survive a fork",
            "restart the notebook, and touch the GPU only inside the training function",
        )
    config = LaunchConfig(
        min_nodes=options.pop("num_nodes", 1),
        max_nodes=options.pop("max_nodes", 1),
        nproc_per_node=num_processes,
        run_id=options.pop("run_id", "none"),
        start_method="fork",
        **options,
    )
    elastic_launch(config=config, entrypoint=_Call(function, environ))(*args)


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
    """Run `function(*args)` on ranks that are forked from this process, and return when all have ended.

    Without `num_processes` there is a rank a GPU, or one. A port of 0 is a free one.

    Raises: ChildFailedError with the error of the rank that failed first.
    """
    if str(mixed_precision).lower() not in ("no", "fp16", "bf16"):
        raise refuse_argument("notebook_launcher", "mixed_precision", mixed_precision, "use no, fp16 or bf16")
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
    alone = num_nodes == 1
    if alone and not rdzv_endpoint:
        # A meeting of its own on a free port: 29500 may be taken.
        rdzv_backend, rdzv_conf = "c10d", {"is_host": True, **(rdzv_conf or {})}
        rdzv_endpoint = f"{master_addr}:{use_port}"
    elif not rdzv_endpoint:
        rdzv_endpoint = f"{master_addr}:{use_port}"
    conf = dict(rdzv_conf or {})
    if rdzv_backend == "static":
        conf.setdefault("rank", node_rank)
    _start(
        function,
        args,
        num_processes,
        environ,
        num_nodes=num_nodes,
        max_nodes=num_nodes,
        run_id=rdzv_id,
        rdzv_backend=rdzv_backend,
        rdzv_endpoint=rdzv_endpoint,
        rdzv_configs=conf,
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        local_addr=master_addr if alone else None,
        **({"log_line_prefix_template": log_line_prefix_template} if log_line_prefix_template else {}),
    )


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> None:
    """Run `function(*args)` on ranks on the CPU, forked from this process."""
    sys.stdout.flush()
    _start(
        function,
        args,
        num_processes,
        {"ACCELERATE_USE_CPU": "yes", "CUDA_VISIBLE_DEVICES": ""},
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
