"""The process that starts the ranks of this node on torch elastic: `python -m distui.launcher.agent <run folder>`.

The command line starts it as a child, in a session of its own, with stdout and stderr in logs/launcher.log. It is the
only part of the launcher that imports torch. It ends when its ranks have ended, and writes outcome.json first, so that
a run has an outcome even when the command line was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from distui.core.config import Config
from distui.core.errors import EXIT_BUG, EXIT_OK, EXIT_RANK_FAILED
from distui.core.paths import JOB_ENV, RunFolder
from distui.launcher.outcome import Ending, Outcome, judge
from distui.launcher.peers import Peers
from distui.launcher.processes import AGENT_PID_ENV, GRACE_S, die_with_parent, kill_job, stop_requested
from distui.launcher.rank_watch import RankWatch

NODE_MEETING_TIMEOUT_S = 900


def main() -> None:
    """Run the job of the folder in argv and exit with 0, 3 (a rank failed), 128 + signal (stopped), or 1 (a bug)."""
    run = RunFolder(Path(sys.argv[1]))
    die_with_parent(int(os.environ[AGENT_PID_ENV]), signal.SIGTERM)
    outcome = run_job(run)
    outcome.write(run)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_status)  # torch's store threads may hold the interpreter back


def run_job(run: RunFolder) -> Outcome:
    """Start the ranks, wait for them, and return how the job ended; no process of it is left where it failed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from distui.core.settings import load

    config = load(run.config, {}, environ={}).config
    spec = json.loads(run.spec.read_text(encoding="utf-8"))
    assert isinstance(config.cluster.nproc, int), "the launcher resolves nproc before it writes config.toml"
    os.environ[JOB_ENV] = str(run.path)
    os.environ[AGENT_PID_ENV] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(config.cluster.threads_per_rank or 1))

    def stop_for_peers() -> None:
        if len(watch.endings()) < watch.num_ranks:  # else this node has done its part, and node 0 may go
            os.kill(os.getpid(), signal.SIGTERM)

    watch = RankWatch(config.cluster.nproc, lambda: kill_job(run))
    watch.start()
    peers = Peers(config.cluster, stop_for_peers) if config.cluster.nodes > 1 else None
    if peers is not None:
        peers.start()
    failures: dict[int, Any] = {}
    state, status, message = "finished", EXIT_OK, ""
    try:
        # elastic replaces ${...} and $$ in arguments: doubled, a dollar reaches the script as it was typed
        arguments = [argument.replace("$", "$$") for argument in spec["command"]]
        elastic_launch(launch_config(config), sys.executable)("-u", "-m", "distui.launcher.rank", *arguments)
    except ChildFailedError as error:
        state, status, failures = "failed", EXIT_RANK_FAILED, dict(error.failures)
    except SignalException as error:
        state, status, message = "stopped", 128 + error.sigval, f"stopped by {error.sigval.name}"
        if stop_requested(run):
            message = "stopped by distui control"
        if peers is not None and peers.failure:
            state, status, message = "failed", EXIT_RANK_FAILED, f"another node failed: {peers.failure}"
    except Exception as error:  # noqa: BLE001  the ranks must be ended and the outcome told, whatever elastic raised
        import traceback

        traceback.print_exc()
        state, status, message = "failed", EXIT_BUG, f"the launcher failed: {type(error).__name__}: {error}"
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)  # nothing is left to be stopped but what is stopped here
    if state != "finished":
        kill_job(run)
    watch.join(1.0)
    endings = watch.endings()
    for rank, failure in failures.items():
        seen = endings.get(rank)
        if seen is None or not seen.known:
            code, time_s = failure.exitcode, seen.time_s if seen else float(failure.timestamp)
            endings[rank] = Ending(rank, failure.pid, code if code >= 0 else None, -code if code < 0 else None, time_s)
    outcome = judge(run, state, status, message, endings, first_rank(config), config.cluster.nproc)
    if peers is not None and state == "failed" and not peers.failure:
        outcome.message = peers.tell(outcome.message)
    return outcome


def first_rank(config: Config) -> int:
    """Return the first global rank of this node."""
    assert isinstance(config.cluster.nproc, int)
    return config.cluster.node_rank * config.cluster.nproc


def launch_config(config: Config) -> Any:
    """Return elastic's LaunchConfig: its own meeting on a free port for one node, a static one for several.

    The static rendezvous gives a node the ranks of its `node_rank`; the dynamic one sorts nodes as they come.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    cluster = config.cluster
    alone = cluster.nodes == 1
    options: dict[str, Any] = {
        "min_nodes": cluster.nodes,
        "max_nodes": cluster.nodes,
        "nproc_per_node": cluster.nproc,
        "run_id": "distui",
        "role": "rank",
        "rdzv_endpoint": f"{'127.0.0.1' if alone else cluster.master_addr}:{cluster.master_port}",
        "rdzv_backend": "c10d" if alone else "static",
        "rdzv_configs": {"is_host": True} if alone else {"rank": cluster.node_rank, "timeout": NODE_MEETING_TIMEOUT_S},
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "local_addr": "127.0.0.1" if alone else None,
        "logs_specs": DefaultLogsSpecs(log_dir=os.devnull),
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "shutdown_timeout": int(GRACE_S),  # not in every torch that distui supports
    }
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    return LaunchConfig(**{name: value for name, value in options.items() if name in known})


if __name__ == "__main__":
    main()
