"""The one way in which ranks are started: resolve, check, make the run's folder, start, watch, tell the end.

Torch-free: the screen is up while the agent process still imports torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.core.config.settings import Resolved, load, to_toml
from distui.core.errors import EXIT_OK, ConfigError, DaemonUnavailable, UserError
from distui.core.hardware.detect import Hardware, detect
from distui.core.paths import JOB_ENV, RunFolder, daemon_socket, default_runs_dir, new_run_id, write_own
from distui.launcher.cluster.allocation import allocation, as_hosts, check_tasks, default_ranks, in_step
from distui.launcher.cluster.hosts import Host, as_setting, choose_hosts
from distui.launcher.cluster.starter import load_starter
from distui.launcher.cluster.submission import is_submission, submit_job
from distui.launcher.compat.faces import check_face
from distui.launcher.job import preflight
from distui.launcher.job.announce import Announcer
from distui.launcher.job.background import Background
from distui.launcher.job.console import launchers_stdin, terminal_kept
from distui.launcher.job.daemon_keeper import DaemonKeeper
from distui.launcher.job.job import AGENT, SUPERVISOR, Job, write_spec
from distui.launcher.job.masking import masked
from distui.launcher.job.notify import notify_away, notify_terminal, without_notify
from distui.launcher.job.outcome import Outcome
from distui.launcher.job.plain import follow_plain, say_start
from distui.launcher.job.provenance import earlier, provenance
from distui.launcher.job.request import LaunchRequest


def launch(request: LaunchRequest) -> int:
    """Run a job from beginning to end and return the exit status of `distui launch`.

    Raises:
        UserError: before anything is started.
    """
    os.environ.pop(JOB_ENV, None)  # a launch from within a rank is a job of its own
    if is_submission(request, resolved := settings_of(request)):
        if resolved.config.cluster.starter != "kubernetes":
            return submit_job(request, resolved)
        from distui.launcher.cluster.jobset import submit_jobset

        return submit_jobset(request, resolved)
    config = resolve(request)
    run = create_run(request, config)
    started_s = time.monotonic()
    screen = wants_screen(request) and config.telemetry.enabled and not request.detach

    def start() -> Job:
        console = None if screen or request.detach or config.cluster.hosts else launchers_stdin()
        saves_on_term = config.cluster.on_preempt == "save"
        return Job(run, request.target, dict(os.environ), console, agent_for(config), saves_on_term=saves_on_term)

    job: Job | Background
    if screen or request.detach:
        job = Background(run, start, lambda job: hold(config, job))
        if request.detach:
            job.let_go()
            print(run.run_id)
            say_detached(run)
            return EXIT_OK
    else:
        job = start()
    stopping = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it: the job outlives the terminal
        stopping.append(signal.SIGHUP)
    restored = {signum: signal.signal(signum, job.on_signal) for signum in stopping}
    try:
        if isinstance(job, Background):
            outcome = _look_at(config, job, start_daemon(config))
        else:
            say_start(run, config)
            with terminal_kept():
                outcome = hold(config, job, lambda socket: follow_plain(job, config, socket))
    finally:
        for signum, handler in restored.items():
            asks = config.cluster.on_preempt == "save" and signum in (signal.SIGTERM, signal.SIGUSR1)
            signal.signal(signum, signal.SIG_IGN if asks else handler)  # what was asked for is done
    if outcome is None:
        say_detached(run)
        return EXIT_OK
    return _conclude(run, config, outcome, time.monotonic() - started_s)


def resolve(request: LaunchRequest) -> Config:
    """Return the configuration with every `auto` decided, after all checks of it and of this node.

    Raises:
        UserError: the first thing that stands against starting; all problems of the configuration at once.
    """
    check_face(request.face)
    config = settings_of(request).config
    preflight.check_target(request.target, Path.cwd())
    hardware = detect()
    if config.run.device == "cpu":
        hardware = replace(hardware, gpus_per_node=())
    config = decided(config, hardware)
    by_hosts = bool(config.cluster.hosts or config.cluster.hostfile or config.cluster.starter in ("slurm", "ray"))
    check_tasks(os.environ, starts_nodes=by_hosts, by_hand=config.cluster.nodes > 1 and not by_hosts)
    if by_hosts:
        hosts = hosts_of(request, config)
        config.cluster.hosts, config.cluster.hostfile = as_setting(hosts), ""
        config.cluster.nodes = len(hosts) - config.cluster.spare_nodes
    elif request.include or request.exclude:
        raise UserError("--include and --exclude choose among hosts", "none are named", "add --hosts or --hostfile")
    if problems := check(config, hardware):
        raise ConfigError(problems)
    if not config.cluster.hosts:
        preflight.check_node(config, hardware)
        preflight.check_port(config)
    preflight.check_runs_dir(runs_dir(config))
    preflight.check_debugger(config, request.debug_rank, request.debugger)
    if config.telemetry.enabled:
        daemon_socket()  # refuses a folder of sockets that others may enter
    return config


def settings_of(request: LaunchRequest) -> Resolved:
    """Return the settings; in a Slurm job of several nodes of which nobody has said anything, it starts on all."""
    resolved = load(request.config_path, request.overrides)
    said = [resolved.origins[f"cluster.{key}"] for key in ("starter", "nodes", "hosts", "hostfile")]
    several = os.environ.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1") and not in_step(os.environ)
    if several and all(origin == "default" for origin in said):
        resolved.config.cluster.starter = "slurm"
    return resolved


def agent_for(config: Config) -> str:
    """Return the module that holds the job's ranks: on this node, or by agents on hosts."""
    return SUPERVISOR if config.cluster.hosts else AGENT


def hosts_of(request: LaunchRequest, config: Config) -> list[Host]:
    """Return the hosts that the settings name. Raises: UserError."""
    cluster = config.cluster
    assert isinstance(cluster.nproc, int)
    listed, is_told = cluster.hosts, load(request.config_path, request.overrides).origins["cluster.nodes"] != "default"
    if not listed and not cluster.hostfile and (found_job := allocation(os.environ)) is not None:
        listed = as_hosts(found_job, cluster.nodes if is_told else 0, cluster.nproc, cluster.min_nodes)
    if not listed and not cluster.hostfile and cluster.starter == "ray":
        listed = ",".join(f"ray{number}" for number in range(cluster.nodes + cluster.spare_nodes))
    found = choose_hosts(listed, cluster.hostfile, request.include, request.exclude, cluster.nproc)
    if cluster.node_rank or cluster.master_port:
        raise UserError(
            "hosts, and --node-rank or --master-port",
            "with hosts one command starts all nodes, and chooses where they meet",
            "leave out --nodes, --node-rank, --master-addr and --master-port, or leave out the hosts",
        )
    load_starter(cluster)
    is_enough = cluster.starter == "slurm" and 0 < cluster.min_nodes <= len(found) < cluster.nodes
    if is_told and cluster.nodes != len(found) - cluster.spare_nodes and not is_enough:
        what = f"--nodes {cluster.nodes}, and {len(found)} hosts"
        raise UserError(what, "each host is one node", f"--nodes {len(found)}, or leave it out")
    return found


def decided(config: Config, hardware: Hardware) -> Config:
    """Return the configuration with numbers for `auto`: ranks, and threads a rank."""
    config = config.model_copy(deep=True)
    job = allocation(os.environ) if config.cluster.starter == "slurm" else None
    if config.cluster.nproc == "auto":
        slurms = default_ranks(job, os.environ, len(hardware.gpus_per_node)) if job is not None else None
        config.cluster.nproc = slurms or hardware.ranks_per_node
    hosts = config.cluster.hosts or config.cluster.hostfile or job
    if config.cluster.threads_per_rank == 0 and not hosts:  # each host divides its own cores
        cpu = hardware.cpu
        cores = min(cpu.num_cores_physical or cpu.num_cores_usable, cpu.num_cores_usable) if cpu else 1
        config.cluster.threads_per_rank = max(1, cores // config.cluster.nproc)
    return config


def runs_dir(config: Config) -> Path:
    """Return the folder that holds the runs."""
    return Path(config.run.dir).expanduser().absolute() if config.run.dir else default_runs_dir()


def configured_runs_dir() -> Path:
    """Return the folder of runs that `distui.toml` and the environment name, for commands that look at runs."""
    return runs_dir(load(None, {}).config)


def create_run(request: LaunchRequest, config: Config) -> RunFolder:
    """Make the run's folder with run.json and config.toml."""
    cluster = config.cluster
    assert isinstance(cluster.nproc, int)
    target = request.target[1] if request.target[0] == "-m" else Path(request.target[0]).stem
    name = config.run.name or target
    by_hand = cluster.nodes > 1 and not cluster.hosts
    run = RunFolder(runs_dir(config) / new_run_id(f"{name}-node{cluster.node_rank}" if by_hand else name))
    run.create()
    toml = to_toml(without_notify(config))
    write_own(run.config, toml)
    spec: dict[str, object] = {
        "run_id": run.run_id,
        "name": name,
        "command": masked(request.target, config.run.mask_arguments),
        "face": request.face,
        "passes_local_rank": request.passes_local_rank,
        "debug_rank": request.debug_rank,
        "debugger": request.debugger,
        "strategy": config.summary(),
        "world_size": cluster.world_size(),
        "num_nodes": cluster.nodes,
        "config_toml": toml,
        "planned_memory_bytes": planned_of(config),
        "provenance": provenance(Path.cwd(), load(request.config_path, request.overrides).origins),
    }
    if job_id := os.environ.get("SLURM_JOB_ID", "") if cluster.starter == "slurm" else "":
        spec["slurm_job"] = job_id
    if (before := earlier(config, run.path.parent, job_id)) is not None:
        spec["earlier"] = before
    if cluster.max_restarts:
        spec["max_restarts"] = cluster.max_restarts
    if cluster.hosts:
        asked = settings_of(request).config
        asked.cluster.nproc = cluster.nproc
        spec["hosts"] = [host.spec() for host in hosts_of(request, asked)]
        spec["config_file"] = str(request.config_path.absolute()) if request.config_path else ""
    write_spec(run, spec)
    return run


def planned_of(config: Config) -> dict[str, int]:
    """Return what a rank's memory should hold, by category; empty where run.model does not name a known model.

    A script's own model is not built here, since that takes a process of its own: `distui plan --script` does.
    """
    from distui.core.plan.models import load_model
    from distui.core.plan.planned import planned_memory

    if not config.run.model or ".py:" in config.run.model:
        return {}
    try:
        model = load_model(config.run.model)
    except UserError as error:
        print(f"distui: memory is not planned: run.model: {error.what}", file=sys.stderr)
        return {}
    assert isinstance(config.cluster.nproc, int)
    return planned_memory(config, model, detect(), config.cluster.world_size())


def wants_screen(request: LaunchRequest) -> bool:
    """Return whether the dashboard can and should be shown: a terminal on both sides, and nobody said no."""
    said_no = request.no_tui or os.environ.get("DISTUI_NO_TUI") == "1" or os.environ.get("TERM", "dumb") == "dumb"
    return not said_no and sys.stdin.isatty() and sys.stdout.isatty()


def start_daemon(config: Config) -> Path | None:
    """Return the daemon's socket, starting one where none answers; the job goes on without."""
    if not config.telemetry.enabled:
        return None
    from distui.daemon.node.spawn import ensure_daemon

    try:
        return ensure_daemon()
    except DaemonUnavailable as error:
        print(f"distui: no daemon, so nothing to watch: {error}", file=sys.stderr)
        return None


def hold(config: Config, job: Job, follow: Callable[[Path | None], None] = lambda socket: None) -> Outcome:
    """Tell the daemon of the job, keep a daemon alive, and wait for the end; `follow` is given the daemon's socket."""
    socket = start_daemon(config)
    announcer = Announcer(job.run, socket)
    started_s = time.monotonic()
    with DaemonKeeper(daemon_socket() if config.telemetry.enabled else None):  # also where it did not start now
        announcer.started()
        follow(socket)
        outcome = job.finish()
        announcer.finished(outcome)
    notify_away(config, job.run, outcome, time.monotonic() - started_s)
    return outcome


def _look_at(config: Config, job: Background, socket: Path | None) -> Outcome | None:
    """Show the job on the dashboard, in plain lines where there is no daemon; None where the user left it."""
    if socket is None:
        say_start(job.run, config)
        follow_plain(job, config, None)
        return job.finish()
    from distui.tui.monitor.app import run_dashboard

    answer = run_dashboard(socket, job.run.run_id, follow_job=job.ended, on_stop=job.stop, on_lost=job.let_go)
    if answer == "stop" and job.stopped_by is None:
        job.stop()
    elif answer == "quit":
        job.let_go()
        return None
    return job.finish()


def say_detached(run: RunFolder) -> None:
    """Say that the job runs in the background, and how to come back to it."""
    name = run.run_id
    print(
        f"distui: {name} goes on in the background: distui attach {name}; distui logs {name} -f; distui stop {name}",
        file=sys.stderr,
    )


def _conclude(run: RunFolder, config: Config, outcome: Outcome, elapsed_s: float) -> int:
    from distui.launcher.job.ending import end_line, failure_report, flops_report, left_behind

    if outcome.exit_status != EXIT_OK and outcome.state == "failed":
        print(failure_report(run, outcome), file=sys.stderr)
    if config.telemetry.profile_flops and config.cluster.node_rank == 0:
        print(flops_report(run))
    if outcome.state == "finished" and (left := left_behind(run)):
        print(left, file=sys.stderr)
    print(end_line(run, outcome, elapsed_s), file=sys.stderr)
    if config.cluster.starter == "slurm" and (job := allocation(os.environ)) is not None:
        from distui.launcher.cluster.batch import queue_again

        if told := queue_again(job, config, outcome):
            print(f"distui: {told}", file=sys.stderr, flush=True)
    notify_terminal(config, run, outcome, elapsed_s)
    return outcome.exit_status
