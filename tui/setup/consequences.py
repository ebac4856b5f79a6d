"""What the value of a setting leads to, in one line with numbers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from distui.core.hardware.detect import Disk
from distui.tui.format import NA, num_bytes, si
from distui.tui.setup.model import WizardState

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def consequence(state: WizardState, key: str) -> str:
    """Return what the present value of `section.key` leads to."""
    return {
        "offload.nvme_path": _nvme_path,
        "cluster.nproc": _nproc,
        "cluster.nodes": _nodes,
        "cluster.master_addr": _master_addr,
        "cluster.master_port": _master_port,
    }[key](state)


def prediction(state: WizardState) -> str:
    """Return bytes a rank and tokens/s of the strategy as it is set now, or why there are none."""
    if state.choice is None or state.model is None:
        return "memory and speed n/a: the model's size is not known" if state.model is None else ""
    plan = state.predict()
    if plan is None:
        why = state.failure.why if state.failure else "the batch cannot be divided so"
        return f"memory and speed n/a: {why}"
    limit = f" of {num_bytes(plan.memory_limit_bytes)}" if plan.memory_limit_bytes else ""
    over = "" if plan.fits or plan.memory_limit_bytes is None else ", does not fit"
    return f"{num_bytes(plan.memory_per_rank_bytes)}{limit} a rank{over}, {si(plan.tokens_per_s, 'tokens/s')}"


def _with(words: str, effect: str) -> str:
    return f"{words}\n  {effect}" if effect else words


def needs_nvme(state: WizardState) -> bool:
    """Return whether the strategy keeps states on a disk."""
    return "nvme" in (state.value("offload.optimizer"), state.value("offload.params"))


def fastest_nvme(state: WizardState) -> str | None:
    """Return this machine's fastest, else roomiest, NVMe disk that can be written; None without one."""
    disks = state.hardware.disks if state.hardware is not None and state.is_this_machine else ()
    found = [disk for disk in disks if disk.is_nvme and os.access(disk.path, os.W_OK)]
    best = max(found, key=lambda disk: (disk.read_rate or 0.0, disk.free_bytes or 0), default=None)
    return best.path if best else None


def disk_of(state: WizardState, folder: str) -> Disk | None:
    """Return the known disk that holds `folder`; None where none of them does."""
    place = Path(folder).expanduser()
    while not place.exists() and place != place.parent:
        place = place.parent
    disks = state.hardware.disks if state.hardware else ()
    try:
        device = place.stat().st_dev
        return next((disk for disk in disks if os.path.exists(disk.path) and os.stat(disk.path).st_dev == device), None)
    except OSError:
        return None


def _nvme_path(state: WizardState) -> str:
    path = state.value("offload.nvme_path")
    plan = state.predict()
    need = f"{num_bytes(plan.nvme_bytes)} a node go there" if plan is not None and plan.nvme_bytes else ""
    if not path:
        return f"{need or 'states go there'}: name a folder on a local NVMe disk"
    disk = disk_of(state, path) if state.is_this_machine else None
    if disk is None:
        return f"{need or 'states go there'}; room and speed of {path} are n/a from here"
    kind = {True: "NVMe", False: "no NVMe disk, so slow", None: f"{disk.file_system or NA}, NVMe {NA}"}[disk.is_nvme]
    rate = si(disk.read_rate, "B/s") if disk.read_rate else f"{NA} (distui doctor --disk {path})"
    return f"{need or 'states go there'}; {num_bytes(disk.free_bytes)} free, {kind}, reads {rate}"


def _nproc(state: WizardState) -> str:
    return _with(_nproc_words(state), prediction(state))


def _nproc_words(state: WizardState) -> str:
    nproc, hardware = state.value("cluster.nproc"), state.hardware
    if hardware is None:
        return f"{nproc} ranks on each node" if nproc != "auto" else "decided when the job starts"
    if nproc == "auto":
        gpus = len(hardware.gpus_per_node)
        found = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        count = hardware.ranks_per_node
        return (
            f"{count} rank{'s' if count > 1 else ''} on a node here ({found}); another machine may give another number"
        )
    if hardware.gpus_per_node and nproc > len(hardware.gpus_per_node):
        return f"{nproc} ranks for {len(hardware.gpus_per_node)} GPUs: too many, each rank needs one of its own"
    cores = hardware.cpu.num_cores_usable if hardware.cpu else None
    if not hardware.gpus_per_node and cores and nproc > cores:
        return f"{nproc} ranks share {cores} cores, so they wait for each other"
    return f"{nproc} rank{'s' if nproc > 1 else ''} on each node, whatever the machine"


def _nodes(state: WizardState) -> str:
    return _with(_nodes_words(state), _scaled(state))


def _scaled(state: WizardState) -> str:
    """Return what twice as many nodes would give, where that can be predicted."""
    if state.choice is None:
        return ""
    nodes = int(state.value("cluster.nodes"))
    trial = replace(state, settings=dict(state.settings))
    trial.set_value("cluster.nodes", str(2 * nodes))
    plan = trial.predict()
    if plan is None:
        return ""
    return (
        f"with {2 * nodes} nodes: {num_bytes(plan.memory_per_rank_bytes)} a rank, {si(plan.tokens_per_s, 'tokens/s')}"
    )


def _nodes_words(state: WizardState) -> str:
    nodes, world_size = state.value("cluster.nodes"), state.world_size
    ranks = "n/a" if world_size is None else str(world_size)
    batch = _batch(state, world_size)
    if nodes == 1:
        return f"one machine, {ranks} rank{'' if world_size == 1 else 's'} in all{batch}"
    return f"{ranks} ranks in all; run distui launch on each node with --node-rank 0 to {nodes - 1}{batch}"


def _batch(state: WizardState, world_size: int | None) -> str:
    """Return the batch equation where the numbers are there."""
    size, micro = state.value("batch.global_size"), state.value("batch.micro_size")
    if not (world_size and size and micro):
        return "" if size or micro else "; batch as the script has it"
    axes = 1
    for axis in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        axes *= state.value(f"strategy.{axis}")
    data_parallel = world_size // axes
    if data_parallel and size % (micro * data_parallel) == 0:
        return f"; batch {size} = {micro} x {size // (micro * data_parallel)} x {data_parallel} ranks"
    return f"; batch {size} cannot be divided by {micro} x {data_parallel} ranks"


def _master_addr(state: WizardState) -> str:
    address, nodes = state.value("cluster.master_addr"), state.value("cluster.nodes")
    if address in LOOPBACK:
        if nodes > 1:
            return f"{address} means each node itself: the {nodes} nodes cannot find each other"
        return "only this machine can reach it, which is enough for one node"
    return f"every node must reach {address}, and it must be node 0's"


def _master_port(state: WizardState) -> str:
    port, nodes = state.value("cluster.master_port"), state.value("cluster.nodes")
    if port == 0:
        return "a free port is taken at each start" + ("; with several nodes name one" if nodes > 1 else "")
    return f"port {port} must be free on node 0, or the launch is refused"
