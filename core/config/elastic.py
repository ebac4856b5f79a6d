"""What keeps a job from going on with fewer hosts. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from distui.core.config.schema import Config
from distui.core.errors import Problem


def elastic_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with `cluster.min_nodes`."""
    cluster = config.cluster
    least = cluster.min_nodes
    if least and (cluster.hosts or cluster.starter == "slurm") and least > cluster.nodes:
        yield Problem(
            "cluster.min_nodes",
            f"min_nodes={least} with {cluster.nodes} hosts",
            "so many are never there",
            f"set cluster.min_nodes to 1..{cluster.nodes}, or name more hosts",
        )
    if least and not cluster.hosts and cluster.starter != "slurm":
        yield Problem(
            "cluster.min_nodes",
            f"min_nodes={least} without hosts",
            "only a job that one command starts on hosts can go on with fewer of them",
            "name the hosts: --hosts a,b,c --nodes 2:3; or set cluster.min_nodes to 0",
        )
    if 0 < least < cluster.nodes and config.batch.global_size is None:
        yield Problem(
            "batch.global_size",
            f"not set, and min_nodes={least}",
            "with fewer hosts the global batch would be smaller, and so the training another",
            "set batch.global_size to the samples of one optimizer step over all ranks",
        )
    if 0 < least < cluster.nodes and not cluster.max_restarts:
        yield Problem(
            "cluster.max_restarts",
            f"max_restarts=0 with min_nodes={least}",
            "going on with fewer hosts is a restart from the last checkpoint",
            "--max-restarts 3, say",
        )


def memory_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with `checkpoint.memory_every_steps`."""
    if not config.checkpoint.memory_every_steps:
        return
    what = f"memory_every_steps={config.checkpoint.memory_every_steps}"
    if not config.cluster.max_restarts:
        yield Problem(
            "checkpoint.memory_every_steps",
            f"{what} and max_restarts=0",
            "what agents keep is gone with the job: only a job that is started again can go on from it",
            "--max-restarts 3, say; or set checkpoint.memory_every_steps to 0",
        )
    if "nvme" in (config.offload.optimizer, config.offload.params):
        yield Problem(
            "checkpoint.memory_every_steps",
            f"{what} with states on NVMe",
            "what rests on a disk is there because host memory has no room for it, and this keeps 4 copies there",
            "set checkpoint.memory_every_steps to 0, and checkpoint.every_steps to a number",
        )


def spare_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with `cluster.spare_nodes`."""
    cluster = config.cluster
    if not cluster.spare_nodes:
        return
    named = len([entry for entry in cluster.hosts.split(",") if entry.strip()])
    if cluster.spare_nodes >= named > 0:
        what, why = f"spare_nodes={cluster.spare_nodes} of {named} hosts", "none would be left to train"
        yield Problem(
            "cluster.spare_nodes", what, why, f"set cluster.spare_nodes to {named - 1} or fewer, or name more hosts"
        )
    if not named:
        what, why = (
            f"spare_nodes={cluster.spare_nodes} without hosts",
            "spares are the last of the hosts that are named",
        )
        yield Problem("cluster.spare_nodes", what, why, "name them: --hosts a,b,c; or set cluster.spare_nodes to 0")
    if not cluster.max_restarts:
        what, why = f"spare_nodes={cluster.spare_nodes} and max_restarts=0", "a spare takes its place at a restart"
        yield Problem("cluster.spare_nodes", what, why, "--max-restarts 3, say")
