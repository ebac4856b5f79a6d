"""Nodes of a Ray cluster: Ray places one actor on each, and another one elsewhere where a node is lost.

An actor calls this side (`door`), and runs the agent that it is given. A placement group spreads them strictly; Ray
places what it has lost anew, and the agents on the other nodes stay.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem, UserError
from distui.core.telemetry.endpoint import is_loopback
from distui.launcher.cluster.hosts import Host
from distui.launcher.cluster.starters.door import Called, Door
from distui.launcher.node.caller import call
from distui.launcher.node.facts import source_address

PREFIX = "ray"
"""Hosts are called ray0, ray1, ...: Ray decides where they are."""
GONE_S = 3.0


class RayStarter:
    """Starts commands by actors of a Ray cluster, one a node."""

    one_machine = True
    """Ray tells nodes apart; several of them may be one machine, to try it out."""
    way = "ray"

    def __init__(self, cluster: ClusterSection) -> None:
        if importlib.util.find_spec("ray") is None:
            why = "the package ray cannot be found by this Python"
            raise UserError("Ray is not installed here", why, 'pip install "distui[ray]"')
        self._cluster = cluster
        self._door: Door | None = None
        self._own = self._where = ""
        self._actors: dict[str, Any] = {}
        self._group: Any = None
        self._opening = asyncio.Lock()

    async def address(self, host: Host) -> str:
        """Return this machine's own address in the Ray cluster: by it, whichever nodes it chooses reach this side.

        Raises: UserError where Ray cannot be reached.
        """
        async with self._opening:
            self._own = self._own or await asyncio.to_thread(self._connect)
        return self._own

    async def start(self, host: Host, command: Sequence[str]) -> Called:
        """Have the actor of `host` run `command` when it calls."""
        async with self._opening:  # hosts are started side by side
            if self._door is None:
                door = Door()
                name = f"[{self._own}]" if ":" in self._own else self._own
                self._where = f"{name}:{await door.open(self._own, 0)}"
                self._door = door
            if host.name not in self._actors:
                self._actors[host.name] = await asyncio.to_thread(self._place, host)
        return self._door.start(host, command)

    def _connect(self) -> str:
        """Join the Ray cluster, ask it for room for all nodes, and return this machine's address in it."""
        ray = library()
        address = self._cluster.ray_address
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="distui")
        except Exception as error:  # of many kinds
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            fix = "run this on a machine of the cluster (ray start --address=HEAD:6379); `ray status` says if it is up"
            raise UserError(f"the Ray cluster {address} cannot be joined", why, fix) from error
        cluster = self._cluster
        ranks = list(cluster.ranks_by_host().values())
        ranks += [ranks[-1]] * cluster.spare_nodes
        bundles = [resources_of(cluster.ray_resources, count, ray.cluster_resources()) for count in ranks]
        self._group = import_module("ray.util").placement_group(bundles, strategy="STRICT_SPREAD", name="distui")
        alive = [one for one in ray.nodes() if one["Alive"]]
        if not self._group.wait(GONE_S):
            print(
                f"ray has not placed {len(bundles)} nodes of {bundles[0]} yet; it has {len(alive)} nodes, with "
                f"{ray.available_resources()} free: `ray status` tells more",
                flush=True,
            )
        return source_of(str(ray.util.get_node_ip_address()), alive)

    def _place(self, host: Host) -> Any:
        """Have an actor call from now on, also after its node was lost and it was placed on another."""
        ray, util = library(), import_module("ray.util.scheduling_strategies")
        assert self._door is not None
        bundle = int(host.name.removeprefix(PREFIX))
        home = str(Path(__file__).resolve().parents[3])
        environ = {} if home.endswith("-packages") else {"PYTHONPATH": home}
        actor = ray.remote(_Caller).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            runtime_env={"env_vars": environ},
            scheduling_strategy=util.PlacementGroupSchedulingStrategy(self._group, bundle),
        )
        found = actor.remote()
        found.call.remote(self._where, host.name, *self._door.secrets)
        return found

    async def close(self, status: int) -> None:
        """Let the nodes end, and give their place back."""
        if self._door is not None:
            await self._door.close(status)
        if self._own:
            await asyncio.to_thread(library().shutdown)  # its actors and its placement group end with their driver

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return its last words."""
        last = next((line for line in reversed(said.splitlines()) if line.strip()), f"exit status {status}")
        fix = "install distui there, at the same path; `ray list actors` says where it was"
        return Problem(host.name, f"the agent could not start on its Ray node (exit status {status})", last, fix)


class _Caller:
    """The actor: a process that Ray has placed."""

    def call(self, where: str, name: str, token: bytes, certificate: bytes) -> int:
        """Run what the other side says, until that lets it go."""
        return call(where, name, token, certificate)


def library() -> Any:
    """Return the module of Ray."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # num_gpus=0: the agent sees the node's GPUs
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return import_module("ray")


def source_of(own: str, alive: Sequence[Any]) -> str:
    """Return by which address the other nodes reach this machine: as Ray knows it, or by the route to them."""
    others = [str(one["NodeManagerAddress"]) for one in alive if str(one["NodeManagerAddress"]) != own]
    if is_loopback(own) and others:
        return source_address(others[0]) or own
    return own


def resources_of(asked: str, ranks: int, there: dict[str, float]) -> dict[str, float]:
    """Return what a node asks of Ray: `asked`, as GPU=8,CPU=64; else a GPU a rank, where there are any, and a CPU.

    Raises: UserError for what is no number of something.
    """
    found = {}
    for entry in filter(None, (word.strip() for word in asked.split(","))):
        name, _, number = entry.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            what, why = f"cluster.ray_resources: {entry!r} is no number of something", "Ray counts resources"
            raise UserError(what, why, "write it as GPU=8,CPU=64") from None
    if found:
        return found
    return {"CPU": float(ranks), **({"GPU": float(ranks)} if there.get("GPU") else {})}
