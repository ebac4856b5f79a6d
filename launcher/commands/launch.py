"""`distui launch`: what stands after the script belongs to the script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from distui.core.errors import UserError
from distui.launcher.compat.deepspeed_flags import Placement, check_config, deepspeed_options, given_flags, place


def overrides_of(assignments: tuple[str, ...], flags: dict[str, str | None]) -> dict[str, str]:
    """Return `section.key` -> text from `--set` and the short flags, which win.

    Raises:
        UserError: an assignment has no `=`.
    """
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"--set {assignment} sets nothing", "it takes section.key=value", "for example --set batch.micro_size=8"
            )
        found[key.strip()] = value.strip()
    found.update({key: value for key, value in flags.items() if value is not None})
    return found


def nodes_of(text: str | None) -> dict[str, str | None]:
    """Return the settings that `--nodes 4` or `--nodes 2:4` stands for."""
    least, colon, most = (text or "").rpartition(":")
    return {"cluster.nodes": most if text is not None else None, "cluster.min_nodes": least if colon else None}


def starter_of(**chosen: bool) -> str | None:
    """Return the starter that --slurm, --k8s or --ray names. Raises: UserError for several."""
    named = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(named) > 1:
        flags = " and ".join(f"--{name}" for name in named)
        raise UserError(f"{flags} together", "a job is started in one of these ways", "leave out all but one")
    return {"k8s": "kubernetes"}.get(named[0], named[0]) if named else None


def deepspeed_placement(face: str | None, flags: dict[str, Any], target: tuple[str, ...]) -> Placement:
    """Return what DeepSpeed's flags and the JSON that the script names come to.

    Raises:
        UserError: DeepSpeed's flags without `--as deepspeed`; see `distui.launcher.compat.deepspeed_flags`.
    """
    if face != "deepspeed":
        if foreign := given_flags(flags):
            raise UserError(
                f"{', '.join(foreign.values())} without --as deepspeed",
                "these are flags of DeepSpeed's launcher",
                "add --as deepspeed, or see `distui launch --help` for ours",
            )
        return Placement(passes_local_rank=False)
    check_config(target[2 if target[0] == "-m" else 1 :])
    return place(flags, target)


@click.command(
    "launch",
    context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]},
    short_help="Start a training script on every rank.",
)
@click.option(
    "--hosts", metavar="A,B:4", help="Hosts to start it on over ssh, with the ranks of each; one run for all."
)
@click.option("--max-restarts", metavar="N", help="How often a failed job is started again from its last checkpoint.")
@click.option(
    "--nproc",
    metavar="N|auto",
    help="Ranks on this node, or on each host; auto: the GPUs, else half of the physical cores.",
)
@click.option("--nodes", metavar="N|LEAST:N", help="Nodes that take part; 2:4 goes on with 2 once others are lost.")
@click.option("--slurm", is_flag=True, help="Submit it to Slurm; or, inside an allocation, start it on its nodes.")
@click.option("--slurm-partition", metavar="NAME", help="Partition to submit to.")
@click.option("--slurm-time", metavar="TIME", help="Time limit to submit with, as 4:00:00.")
@click.option("--slurm-args", metavar="TEXT", help="Further options of sbatch, in quotes: '--gpus-per-node=8'.")
@click.option("--k8s", is_flag=True, help="Make a JobSet of as many pods as --nodes, and follow it to its end.")
@click.option("--k8s-image", metavar="IMAGE", help="Image of the pods, with Python, distui and the script in it.")
@click.option("--k8s-namespace", metavar="NAME", help="Namespace of the JobSet; else that of the context.")
@click.option("--ray", "ray_address", metavar="ADDR", help="Have Ray place --nodes nodes: HEAD:6379, or auto.")
@click.option("--dry-run", is_flag=True, help="With --slurm or --k8s: print what is submitted, and submit nothing.")
@click.option("--node-rank", metavar="R", help="This node's place among them, from 0.")
@click.option("--master-addr", metavar="ADDR", help="Address of node 0.")
@click.option("--master-port", metavar="PORT", help="Port on node 0 where ranks meet.")
@click.option("--backend", metavar="NAME", help="strategy.backend: native, ddp, fsdp2, deepspeed, or a plug-in's.")
@click.option("--zero", metavar="0-3", help="strategy.zero_stage: what is sharded over the ranks.")
@click.option("--offload", metavar="HOME", help="offload.optimizer: none, cpu or nvme.")
@click.option("--name", metavar="NAME", help="Name of the run.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting, as section.key=value.")
@click.option(
    "--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help="Settings; else ./distui.toml."
)
@click.option("--as", "face", metavar="NAME", help="Run a script written for accelerate or deepspeed, unchanged.")
@deepspeed_options
@click.option("--profile-flops", is_flag=True, help="At the end, show FLOPs and forward time of every module.")
@click.option("--no-tui", is_flag=True, help="Plain lines even in a terminal (also DISTUI_NO_TUI=1).")
@click.option("--detach", is_flag=True, help="Start it in the background; distui attach, logs, stop are for it then.")
@click.option(
    "--debug-rank", metavar="R", type=int, help="breakpoint() in rank R waits for `distui attach --debug`, anywhere."
)
@click.option(
    "--debugger",
    type=click.Choice(["pdb", "debugpy"]),
    default="pdb",
    show_default=True,
    help="What --debug-rank opens; debugpy: on a port of this machine, for an editor.",
)
@click.option("-m", "--module", is_flag=True, help="The target is a module, as with python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(
    hosts: str | None,
    max_restarts: str | None,
    nproc: str | None,
    nodes: str | None,
    slurm: bool,
    slurm_partition: str | None,
    slurm_time: str | None,
    slurm_args: str | None,
    k8s: bool,
    k8s_image: str | None,
    k8s_namespace: str | None,
    ray_address: str | None,
    dry_run: bool,
    node_rank: str | None,
    master_addr: str | None,
    master_port: str | None,
    backend: str | None,
    zero: str | None,
    offload: str | None,
    name: str | None,
    assignments: tuple[str, ...],
    config_path: Path | None,
    face: str | None,
    profile_flops: bool,
    no_tui: bool,
    detach: bool,
    debug_rank: int | None,
    debugger: str,
    module: bool,
    script: str,
    args: tuple[str, ...],
    **deepspeed: Any,
) -> int:
    """Start SCRIPT on every rank, with ARGS passed through untouched.

    With --hosts or --hostfile it is one job on all of these hosts, which this machine reaches by ssh. With --slurm it
    is a batch job, whose id is printed; inside an allocation it is one job on its nodes, which srun reaches. With --k8s
    it is a JobSet of pods; with --ray, Ray places its nodes.

    In a terminal the dashboard shows the job, and q leaves it to run in the background; otherwise rank 0's output comes
    as it is, with a line of progress every few seconds. There rank 0 has this command's stdin, for input() and
    breakpoint(), which other ranks pass over. With --as deepspeed the flags of DeepSpeed's launcher are taken
    too (--num_gpus, --hostfile, --include, ...). The exit status is the job's: 0 done (or left in the background), 3 a
    rank failed, 130 stopped by Ctrl-C, 2 a mistake found first.
    """
    from distui.core.errors import UserError
    from distui.launcher.job.launch import launch
    from distui.launcher.job.request import LaunchRequest

    if hosts is not None and not hosts.strip():
        raise UserError("--hosts names no host", "it is empty", "name hosts, as a,b:4, or leave --hosts out")
    flags = {
        "cluster.hosts": hosts,
        "cluster.max_restarts": max_restarts,
        "cluster.nproc": nproc,
        **nodes_of(nodes),
        "cluster.starter": starter_of(slurm=slurm, k8s=k8s, ray=ray_address is not None),
        "cluster.ray_address": ray_address,
        "cluster.k8s_image": k8s_image,
        "cluster.k8s_namespace": k8s_namespace,
        "cluster.slurm_partition": slurm_partition,
        "cluster.slurm_time": slurm_time,
        "cluster.slurm_args": slurm_args,
        "cluster.node_rank": node_rank,
        "cluster.master_addr": master_addr,
        "cluster.master_port": master_port,
        "strategy.backend": backend,
        "strategy.zero_stage": zero,
        "offload.optimizer": offload,
        "run.name": name,
        "telemetry.profile_flops": "true" if profile_flops else None,
    }
    ours = {name: deepspeed.pop(name) if face != "deepspeed" else None for name in ("hostfile", "include", "exclude")}
    flags["cluster.hostfile"] = ours["hostfile"]
    target = ("-m", script, *args) if module else (script, *args)
    placement = deepspeed_placement(face, deepspeed, target)
    os.environ.update(placement.environment)
    overrides = {**placement.overrides, **overrides_of(assignments, flags)}
    return launch(
        LaunchRequest(
            target,
            overrides,
            config_path,
            no_tui,
            face,
            placement.passes_local_rank,
            detach,
            debug_rank,
            debugger,
            ours["include"] or "",
            ours["exclude"] or "",
            dry_run,
        )
    )
