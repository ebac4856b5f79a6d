"""The process that starts the ranks of this node: `python -m distui.launcher.node.agent <run folder>`.

The command line starts it as a child, in a session of its own, with stdout and stderr in logs/launcher.log. On one node
it does without torch, so that the ranks' own import of it is the only one a start waits for. It ends when its ranks
have ended, and writes outcome.json first, so that a run has an outcome even when the command line was killed.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distui.core.config.schema import ClusterSection, Config
from distui.core.errors import EXIT_BUG, EXIT_OK, EXIT_PREEMPTED, EXIT_RANK_FAILED
from distui.core.paths import JOB_ENV, RunFolder
from distui.launcher.job.console import CONSOLE_ENV
from distui.launcher.job.outcome import Ending, Outcome, gave_way, judge, last_step, preempted_words, tell_ending
from distui.launcher.job.processes import (
    AGENT_PID_ENV,
    die_with_parent,
    give_way,
    kill_job,
    request_preemption,
    stop_requested,
)
from distui.launcher.memory.keeper import Keeper
from distui.launcher.node.peers import Peers
from distui.launcher.node.ranks import STOP_SIGNALS, Place, Ranks, listen
from distui.launcher.node.restarts import Restarts, newest_checkpoint, restart_words, say_notice


def main() -> None:
    """Run the job of the folder in argv and exit with 0, 3 (a rank failed), 128 + signal (stopped), or 1 (a bug)."""
    run = RunFolder(Path(sys.argv[1]))
    die_with_parent(int(os.environ[AGENT_PID_ENV]), signal.SIGTERM)
    signal.signal(signal.SIGUSR1, lambda number, frame: request_preemption(run))
    outcome = run_job(run, json.load(sys.stdin))
    try:
        outcome.write(run)
    except OSError as error:  # a full disk, or the folder is gone: the status says it all the same
        print(f"outcome.json cannot be written: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(outcome.exit_status)  # the store's threads may hold the interpreter back


def run_job(run: RunFolder, command: Sequence[str]) -> Outcome:
    """Run attempts until one ends well or no more is to be made, and return how the last one ended.

    No process of the job is left where it failed.
    """
    from distui.core.config.settings import load

    config = load(run.config, {}, environ={}).config
    cluster = config.cluster
    assert isinstance(cluster.nproc, int), "the launcher resolves nproc before it writes config.toml"
    os.environ[JOB_ENV] = str(run.path)
    if cluster.on_preempt == "save":  # SIGTERM is then no end
        die_with_parent(int(os.environ[AGENT_PID_ENV]), signal.SIGINT)
    os.environ[AGENT_PID_ENV] = str(os.getpid())
    console = os.environ.pop(CONSOLE_ENV, "")
    os.environ.setdefault("OMP_NUM_THREADS", str(cluster.threads_per_rank or 1))
    restarts = Restarts(cluster.max_restarts)
    keeper = _keeper(config)
    while True:
        kept = keeper.newest() if keeper is not None else None
        if keeper is not None:
            os.environ.update(keeper.begin(range(cluster.nproc), kept[0] if kept else ""))
        restarts.ready(run, cluster.nproc)
        outcome = _run_attempt(run, cluster, command, console, restarts.attempt)
        outcome.restarts = restarts.attempt
        if not cluster.max_restarts or outcome.state != "failed":
            return outcome
        first = cluster.node_rank * cluster.nproc
        steps = [last_step(run, rank) for rank in range(first, first + cluster.nproc)]
        step = max((one for one in steps if one is not None), default=None)
        if why_not := restarts.wanted(outcome, step):
            say_notice(run, f"not started again: {why_not}")
            return outcome
        restarts.begin(run, outcome, step, cluster.nproc)
        newest = newest_checkpoint(run, config.checkpoint)
        kept = keeper.newest() if keeper is not None else None
        say_notice(run, restart_words(outcome, restarts, newest, kept[1] if kept else None))


def _keeper(config: Config) -> Keeper | None:
    """Return what keeps the ranks' saves in memory; None where none are made."""
    if not config.checkpoint.memory_every_steps or not config.cluster.max_restarts:
        return None
    folder = Path(tempfile.mkdtemp(prefix="distui-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    keeper = Keeper(folder / "memory", lambda save, kept: keeper.settle(save))
    return keeper


def _run_attempt(
    run: RunFolder, cluster: ClusterSection, command: Sequence[str], console: str, attempt: int
) -> Outcome:
    assert isinstance(cluster.nproc, int)
    nproc, endings, ranks = cluster.nproc, dict[int, Ending](), None

    def stop_for_peers() -> None:
        if len(endings) < nproc:  # else this node has done its part, and node 0 may go
            os.kill(os.getpid(), signal.SIGTERM)

    state, status, message, peers = "finished", EXIT_OK, "", None
    try:
        store = listen(cluster) if cluster.node_rank == 0 else None
        port = store.getsockname()[1] if store is not None and cluster.nodes == 1 else cluster.master_port
        place = replace(Place.of(cluster, port), attempt=attempt)
        gives_way = (lambda: give_way(run)) if cluster.on_preempt == "save" else None
        ranks = Ranks(place, command, store if cluster.nodes == 1 else None, console, gives_way=gives_way)
        endings = ranks.endings
        if cluster.nodes > 1:
            peers = Peers(cluster, store, stop_for_peers)
            peers.start()
        ranks.wait(lambda: kill_job(run), lambda: tell_ending(run, ranks.stopped_by, endings))
        if ranks.stopped_by is not None:
            state, status, message = "stopped", 128 + ranks.stopped_by, f"stopped by {ranks.stopped_by.name}"
            if stop_requested(run):
                message = "stopped by distui control"
            if peers is not None and peers.failure:
                state, status, message = "failed", EXIT_RANK_FAILED, f"another node failed: {peers.failure}"
        elif gave_way(endings):
            steps = [last_step(run, rank) for rank in endings]
            message = preempted_words(max((step for step in steps if step is not None), default=None))
            state, status = "stopped", EXIT_PREEMPTED
        elif any(ending.bad for ending in endings.values()):
            state, status = "failed", EXIT_RANK_FAILED
    except Exception as error:  # noqa: BLE001  the ranks must be ended and the outcome told, whatever it was
        traceback.print_exc()
        state, status, message = "failed", EXIT_BUG, f"the launcher failed: {type(error).__name__}: {error}"
    if attempt >= cluster.max_restarts or state != "failed":
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # nothing is left to be stopped but what is stopped here
    if state != "finished":
        kill_job(run)
    outcome = judge(run, state, status, message, endings, cluster.node_rank * nproc, nproc)
    if peers is not None and state == "failed" and not peers.failure:
        outcome.message = peers.tell(outcome.message)
    if peers is not None:
        peers.leave()
    if ranks is not None and ranks.stopped_by is not None and outcome.state == "failed" and not message:
        outcome.state, outcome.exit_status = "stopped", 128 + ranks.stopped_by  # while what had failed was being ended
    return outcome


if __name__ == "__main__":
    main()
