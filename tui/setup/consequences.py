"""What the value of a setting leads to, in one line with numbers."""

from __future__ import annotations

from distui.tui.setup.model import WizardState

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def consequence(state: WizardState, key: str) -> str:
    """Return what the present value of `section.key` leads to."""
    return {
        "cluster.nproc": _nproc,
        "cluster.nodes": _nodes,
        "cluster.master_addr": _master_addr,
        "cluster.master_port": _master_port,
    }[key](state)


def _nproc(state: WizardState) -> str:
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
        return ""
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
