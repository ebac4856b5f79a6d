"""`distui launch --slurm` outside of a job: checked here, and put into Slurm's queue."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from distui.core.config.check import check
from distui.core.config.settings import Resolved
from distui.core.errors import EXIT_OK, ConfigError, Problem, UserError
from distui.launcher.cluster.allocation import allocation
from distui.launcher.job import preflight
from distui.launcher.job.request import LaunchRequest

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def is_submission(request: LaunchRequest, resolved: Resolved) -> bool:
    """Tell whether the job is put into a queue: this process is in no job of Slurm's, and in no pod, or only prints."""
    cluster = resolved.config.cluster
    named = cluster.hosts or cluster.hostfile
    if cluster.starter == "kubernetes" and not named:
        return True
    if request.dry_run and (cluster.starter != "slurm" or named):
        raise UserError(
            "--dry-run prints what is submitted, and nothing is",
            "hosts are named" if named else f"cluster.starter is {cluster.starter}, which starts the job from here",
            "add --slurm or --k8s, or leave --dry-run out",
        )
    return cluster.starter == "slurm" and not named and (request.dry_run or allocation(os.environ) is None)


def submit_job(request: LaunchRequest, resolved: Resolved) -> int:
    """Submit the job, or print what is submitted; return the exit status. Raises: UserError."""
    from distui.launcher.cluster.batch import Submission, batch_script, submit

    config, folder = resolved.config, Path.cwd()
    preflight.check_target(request.target, folder)
    shape, nproc = config.model_copy(deep=True), config.cluster.nproc
    shape.cluster.hosts = ",".join(f"node{number}" for number in range(config.cluster.nodes))  # Slurm will name them
    problems = check(shape, None, nproc * config.cluster.nodes if isinstance(nproc, int) else None)
    if problems := [*problems, *_time_problems(config.cluster.slurm_time, config.cluster.slurm_signal_s)]:
        raise ConfigError(problems)
    name = config.run.name or (request.target[1] if request.target[0] == "-m" else Path(request.target[0]).stem)
    asked = Submission(name, request.target, options_of(request), request.overrides, resolved.origins, folder)
    script = batch_script(asked, config)
    if request.dry_run:
        print(script, end="")
        return EXIT_OK
    job_id = submit(script, folder)
    print(job_id)
    print(
        f"distui: Slurm job {job_id} is queued: squeue -j {job_id} shows it, scancel {job_id} ends it, its output goes "
        f"to {folder}/slurm-{job_id}.out unless cluster.slurm_args says otherwise; then: distui runs, distui monitor",
        file=sys.stderr,
    )
    return EXIT_OK


def options_of(request: LaunchRequest) -> list[str]:
    """Return the options of `distui launch` that are no settings, to be typed again where it runs."""
    found = []
    if request.face is not None:
        found += ["--as", request.face]
        if request.face == "deepspeed" and not request.passes_local_rank:
            found.append("--no_local_rank")
    for option, value in (
        ("--config", str(request.config_path.absolute()) if request.config_path else ""),
        ("--include", request.include),
        ("--exclude", request.exclude),
        ("--debug-rank", "" if request.debug_rank is None else str(request.debug_rank)),
        ("--debugger", "" if request.debug_rank is None else request.debugger),
    ):
        if value:
            found += [option, value]
    return found


def seconds_of(text: str) -> float | None:
    """Return a time limit as Slurm writes it (`90`, `4:00:00`, `2-12`) in seconds; None for what is none."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        return None
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _time_problems(limit: str, signal_s: int) -> list[Problem]:
    if not limit or limit.lower() in ("infinite", "unlimited"):
        return []
    limit_s = seconds_of(limit)
    if limit_s is None:
        fix = "write minutes, h:mm:ss or d-hh: 90, 4:00:00, 2-12"
        return [Problem("cluster.slurm_time", f"{limit!r} is no time limit", "sbatch --time would not take it", fix)]
    if limit_s and limit_s <= signal_s:
        what = f"a limit of {limit_s:.0f} s, and slurm_signal_s={signal_s}"
        why = "the job would be told to give way as soon as it begins"
        return [Problem("cluster.slurm_time", what, why, "ask for more time, or set cluster.slurm_signal_s lower")]
    return []
