"""What cannot work together, found before anything starts: every problem at once, in numbers, with a fix.

Torch-free. `check` is pure but for looking at the folders that the configuration names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from distui.core.config.backends import check_backend
from distui.core.config.batch import solve_batch
from distui.core.config.elastic import elastic_problems, memory_problems, spare_problems
from distui.core.config.schema import Config
from distui.core.config.shards import divisors, group_problems, shard_problems
from distui.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from distui.core.hardware.detect import Hardware

BF16_CAPABILITY = (8, 0)

MODEL_AXES = ("tensor_parallel", "pipeline_parallel", "context_parallel")
"""Axes that divide the world size; what is left is data-parallel. Expert parallelism lives inside the latter."""


def check(config: Config, hardware: Hardware | None = None, world_size: int | None = None) -> list[Problem]:
    """Return every problem of a configuration, empty where it can run.

    `world_size` is the number of ranks over all nodes; without it, it follows from `cluster`, and under
    `nproc = "auto"` what depends on it is not checked.
    """
    if world_size is None and isinstance(config.cluster.nproc, int):
        world_size = config.cluster.world_size()
    problems = [*shard_problems(config), *check_backend(config), *_cluster(config), *_folders(config)]
    problems += [*offload_problems(config), *_states(config), *_compression(config), *_notify(config)]
    problems += [*tensor_problems(config), *pipeline_problems(config), *expert_problems(config)]
    if hardware is not None:
        problems += _devices(config, hardware)
    if world_size is not None:
        problems += rank_problems(config, world_size)
    return problems


def _notify(config: Config) -> Iterator[Problem]:
    webhook = urlsplit(config.notify.webhook)
    if config.notify.webhook and (webhook.scheme not in ("http", "https") or not webhook.hostname):
        yield Problem(
            "notify.webhook",
            f"{webhook.scheme or 'no scheme'} is not http or https, or no host is named",
            "a webhook is posted to",
            "set notify.webhook to https://host/path",
        )


def _cluster(config: Config) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.node_rank >= cluster.nodes:
        yield Problem(
            "cluster.node_rank",
            f"node_rank={cluster.node_rank} is outside of {cluster.nodes} node{'s' if cluster.nodes > 1 else ''}",
            f"nodes are counted from 0 to {cluster.nodes - 1}",
            f"set cluster.node_rank to 0..{cluster.nodes - 1}, or cluster.nodes to {cluster.node_rank + 1} or more",
        )
    if cluster.nodes > 1 and cluster.master_port == 0 and not cluster.hosts:
        yield Problem(
            "cluster.master_port",
            f"master_port=0 with {cluster.nodes} nodes",
            "0 takes a free port of node 0, which the other nodes cannot know",
            "set cluster.master_port to the same free port on every node, for example 29500",
        )
    if cluster.nodes > 1 and cluster.max_restarts and not cluster.hosts:
        yield Problem(
            "cluster.max_restarts",
            f"max_restarts={cluster.max_restarts} with {cluster.nodes} nodes that are started by hand",
            "nobody could start all of them again together",
            "name the hosts, so that one command starts them: --hosts a,b; or set cluster.max_restarts to 0",
        )
    yield from elastic_problems(config)
    yield from spare_problems(config)
    yield from memory_problems(config)
    counts = set(cluster.ranks_by_host().values())
    if len(counts) > 1 and (
        config.compression.gradients not in ("none", "onebit") or config.compression.weights != "none"
    ):
        yield Problem(
            "cluster.hosts",
            f"hosts with {' and '.join(map(str, sorted(counts)))} ranks, and compression",
            "compressed traffic takes its second hop between hosts, which needs as many ranks on each",
            "start as many ranks on every host, or set compression.gradients and compression.weights to none",
        )
    if cluster.master_port > 65535:
        yield Problem(
            "cluster.master_port",
            f"master_port={cluster.master_port} is no port",
            "ports end at 65535",
            "set cluster.master_port to 0 or to 1024..65535",
        )


def offload_problems(config: Config) -> Iterator[Problem]:
    """Yield what keeps states from the homes that are asked for."""
    offload, stage = config.offload, config.strategy.zero_stage
    if offload.params != "none" and stage != 3:
        yield Problem(
            "offload.params",
            f"params={offload.params} with zero_stage={stage}",
            f"only stage 3 shards parameters; under stage {stage} every rank needs all of them on its device",
            "set strategy.zero_stage to 3, or offload.params to none",
        )
    if offload.optimizer != "none" and stage == 0:
        yield Problem(
            "offload.optimizer",
            f"optimizer={offload.optimizer} with zero_stage=0",
            "only stages 1, 2 and 3 shard optimizer states; a replicated state has no home but the device",
            "set strategy.zero_stage to 1, 2 or 3, or offload.optimizer to none",
        )
    if "nvme" in (offload.optimizer, offload.params):
        if not offload.nvme_path:
            yield Problem(
                "offload.nvme_path",
                "not set, and a home is nvme",
                f"offload.optimizer={offload.optimizer}, offload.params={offload.params}",
                "set offload.nvme_path to a folder on a local NVMe disk",
            )
        else:
            yield from _writable("offload.nvme_path", offload.nvme_path)


def _states(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.state_bits == 32:
        return
    if optimizer.name not in ("adamw", "adam"):
        yield Problem(
            "optimizer.state_bits",
            f"state_bits={optimizer.state_bits} with name={optimizer.name}",
            "only the two moments of Adam and AdamW are kept in 8 bits",
            "set optimizer.state_bits to 32, or optimizer.name to adamw",
        )
    if config.strategy.backend != "native":
        yield Problem(
            "optimizer.state_bits",
            f"state_bits={optimizer.state_bits} with backend={config.strategy.backend}",
            "8-bit states are the native engine's",
            "set strategy.backend to native, or optimizer.state_bits to 32",
        )
    if config.offload.optimizer != "none":
        yield Problem(
            "optimizer.state_bits",
            f"state_bits={optimizer.state_bits} with offload.optimizer={config.offload.optimizer}",
            "states that leave the device are fp32: the host's fused Adam steps them",
            "set optimizer.state_bits to 32, or offload.optimizer to none",
        )


def _compression(config: Config) -> Iterator[Problem]:
    compression, stage = config.compression, config.strategy.zero_stage
    if config.strategy.backend != "native":  # refused with the backend
        return
    if compression.gradients == "onebit" and stage > 0:
        yield Problem(
            "compression.gradients",
            f"gradients=onebit with zero_stage={stage}",
            "1-bit Adam exchanges the momentum, of which every rank must hold all; under stages 1 to 3 a rank holds "
            "its share only, and the weights would travel in 16 or 32 bits beside the 1 bit",
            "set strategy.zero_stage to 0, or compression.gradients to int8 or fp8",
        )
    if compression.gradients == "onebit" and config.optimizer.name not in ("adam", "adamw"):
        yield Problem(
            "compression.gradients",
            f"gradients=onebit with optimizer.name={config.optimizer.name}",
            "1-bit Adam freezes the variance of Adam or AdamW; other optimizers have none",
            "set optimizer.name to adam or adamw and use it, or compression.gradients to int8 or fp8",
        )
    if compression.gradients == "onebit" and config.optimizer.state_bits != 32:
        yield Problem(
            "compression.gradients",
            f"gradients=onebit with optimizer.state_bits={config.optimizer.state_bits}",
            "1-bit Adam keeps the momentum in fp32, and the variance is not read once it is frozen",
            "set optimizer.state_bits to 32, or compression.gradients to int8 or fp8",
        )
    if compression.weights != "none" and stage != 3:
        yield Problem(
            "compression.weights",
            f"weights={compression.weights} with zero_stage={stage}",
            f"only stage 3 gathers weights to compute with; under stage {stage} the ranks hold them, exact",
            "set strategy.zero_stage to 3, or compression.weights to none",
        )
    size = compression.block_size
    if not 32 <= size <= 8192 or size & (size - 1):
        yield Problem(
            "compression.block_size",
            f"block_size={size}",
            "blocks are powers of two from 32 (4 bytes of scale to 32 of data) to 8192 (one block of a kernel)",
            "set compression.block_size to 128, 256 or 512",
        )


def _folders(config: Config) -> Iterator[Problem]:
    if config.checkpoint.dir:
        yield from _writable("checkpoint.dir", config.checkpoint.dir, created=True)


def _writable(key: str, name: str, *, created: bool = False) -> Iterator[Problem]:
    """Yield what is wrong with a folder; one that is `created` on demand needs only a writable ancestor."""
    path = Path(name).expanduser()
    place = path.absolute()
    while created and not place.exists() and place != place.parent:
        place = place.parent
    if not place.exists():
        yield Problem(key, f"{path} does not exist", "it must be there before the job starts", f"mkdir -p {path}")
    elif not place.is_dir():
        yield Problem(key, f"{path} cannot be a folder", f"{place} is a file", "name a folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(
            key,
            f"{path} is not writable",
            f"uid {os.getuid()} may not write into {place} (mode {place.stat().st_mode & 0o777:03o})",
            f"name a folder of your own, or change the rights of {place}",
        )


def tensor_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with tensor parallelism."""
    size = config.strategy.tensor_parallel
    if size == 1 and config.strategy.tensor_plan:
        yield Problem(
            "strategy.tensor_plan",
            "is set, and tensor_parallel=1",
            "a plan says how parameters are cut over tensor-parallel ranks, and there is one",
            "set strategy.tensor_parallel to 2 or more, or leave strategy.tensor_plan empty",
        )
    if config.strategy.sequence_parallel and (size == 1 or config.strategy.pipeline_parallel > 1):
        stages = config.strategy.pipeline_parallel
        yield Problem(
            "strategy.sequence_parallel",
            f"sequence_parallel=true with {'tensor_parallel=1' if size == 1 else f'pipeline_parallel={stages}'}",
            "tensor-parallel ranks hold the same hidden state, and each would keep its part of the tokens"
            if size == 1
            else "what a stage hands on is whole in this version",
            "set strategy.tensor_parallel to 2 or more, or strategy.sequence_parallel to false"
            if size == 1
            else "set strategy.sequence_parallel to false, or strategy.pipeline_parallel to 1",
        )
    if config.strategy.gather_logits and (tile := config.activation_checkpointing.loss_tile):
        what, why = f"gather_logits=true with loss_tile={tile}", "in tiles, whole logits never exist"
        yield Problem("strategy.gather_logits", what, why, "leave out one of the two")
    if size == 1 or config.strategy.backend != "native":  # refused with the backend
        return
    why = (
        "blocks that share a scale would hold cut parameters beside whole ones, and what the ranks have whole would "
        "come out otherwise on each of them"
    )
    yield from _not_beside(config, "tensor_parallel", ("compression.gradients", "compression.weights"), why)
    why = "blocks that share a scale would hold states of cut parameters beside those of whole ones"
    yield from _not_beside(config, "tensor_parallel", ("optimizer.state_bits",), why)


def pipeline_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with a pipeline."""
    strategy = config.strategy
    size = strategy.pipeline_parallel
    if size == 1 or strategy.backend != "native":  # refused with the backend
        return
    if strategy.pipeline_schedule == "zbv" and strategy.zero_stage > 1:
        yield Problem(
            "strategy.pipeline_schedule",
            f"pipeline_schedule=zbv with zero_stage={strategy.zero_stage}",
            "its backwards are in two parts, and each would reduce or gather all that the stage holds",
            "set strategy.zero_stage to 1, or strategy.pipeline_schedule to interleaved or 1f1b",
        )
    keys = (
        *("compression.gradients", "compression.weights"),
        *("offload.optimizer", "offload.params", "optimizer.state_bits"),
    )
    why = "a pipeline's stages hold whole states on their devices in this version"
    yield from _not_beside(config, "pipeline_parallel", keys, why)


def _not_beside(config: Config, axis: str, keys: Sequence[str], why: str) -> Iterator[Problem]:
    for path in keys:
        section, key = path.split(".")
        of_section = getattr(config, section)
        value, default = getattr(of_section, key), type(of_section).model_fields[key].default
        if value != default:
            size = getattr(config.strategy, axis)
            fix = f"set {path} to {default}, or strategy.{axis} to 1"
            yield Problem(path, f"{key}={value} with {axis}={size}", why, fix)


def expert_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not go with experts over ranks."""
    size = config.strategy.expert_parallel
    if size == 1 or config.strategy.backend != "native":  # refused with the backend
        return
    keys = ("compression.gradients", "compression.weights", "optimizer.state_bits")
    why = "experts and what is whole are shared among different ranks; blocks with one scale are not, in this version"
    yield from _not_beside(config, "expert_parallel", keys, why)


def rank_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Yield what does not fit the number of ranks."""
    model_ranks = 1
    for axis in MODEL_AXES:
        model_ranks *= getattr(config.strategy, axis)
    if world_size % model_ranks:
        sizes = [getattr(config.strategy, axis) for axis in MODEL_AXES]
        below = world_size - world_size % model_ranks
        ranks = " or ".join(str(size) for size in (below, below + model_ranks) if size)
        yield Problem(
            "strategy",
            f"the parallel axes do not divide the {world_size} ranks",
            f"tensor x pipeline x context = {' x '.join(map(str, sizes))} = {model_ranks}; "
            f"{world_size} = {world_size // model_ranks} x {model_ranks} + {world_size % model_ranks}",
            f"start {ranks} ranks, or choose axes whose product divides {world_size}: {divisors(world_size)}",
        )
        return
    data, shared = world_size // model_ranks, config.strategy.shard_size
    if problems := list(group_problems(shared, data)):
        yield from problems
        return
    tensor, context = config.strategy.tensor_parallel, config.strategy.context_parallel
    experts, sharing = config.strategy.expert_parallel, (shared or data) * context * tensor
    if sharing % experts:
        kinds = " x ".join(["data", *["context"] * (context > 1), *["tensor"] * (tensor > 1)])
        yield Problem(
            "strategy.expert_parallel",
            f"expert_parallel={experts} does not divide the {sharing} {kinds}-parallel ranks"
            f"{' of a shard group' if shared else ''}",
            f"they share the experts among them, {experts} at a time; {sharing} = {sharing // experts} x {experts} + "
            f"{sharing % experts}",
            f"set strategy.expert_parallel to one of {divisors(sharing)}",
        )
    try:
        accumulation = solve_batch(config.batch, world_size // model_ranks).accumulation or 1
    except ConfigError as error:
        yield from error.problems
        return
    stages = config.strategy.pipeline_parallel
    if stages > 1 and config.strategy.pipeline_schedule == "interleaved" and accumulation % stages:
        above = accumulation + stages - accumulation % stages
        yield Problem(
            "batch.accumulation",
            f"accumulation={accumulation} with pipeline_schedule=interleaved on {stages} ranks of a pipeline",
            f"micro-batches go in rounds of {stages}, and {accumulation} are {accumulation // stages} of them and "
            f"{accumulation % stages} more",
            f"set batch.accumulation to {above}, or strategy.pipeline_schedule to 1f1b",
        )
        return
    if accumulation < stages:
        yield Problem(
            "batch.accumulation",
            f"accumulation={accumulation} with pipeline_parallel={stages}",
            f"with {accumulation} micro-batch{'es' if accumulation > 1 else ''} a step, {stages - accumulation} of "
            f"{stages} stages would have none at all times",
            f"set batch.accumulation to {stages} or more; {4 * stages} leave {(stages - 1) / (5 * stages - 1):.0%} of "
            f"the time unused, {stages} {(stages - 1) / (2 * stages - 1):.0%}",
        )


def _devices(config: Config, hardware: Hardware) -> Iterator[Problem]:
    gpus = hardware.gpus_per_node
    nproc = config.cluster.nproc
    here = not config.cluster.hosts  # hosts say themselves what they have
    if here and config.run.device == "cuda" and not gpus:
        yield Problem("run.device", "device=cuda", f"there is no GPU: {hardware.name}", "set run.device to auto or cpu")
    if here and gpus and isinstance(nproc, int) and nproc > len(gpus):
        yield Problem(
            "cluster.nproc",
            f"nproc={nproc} on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''} a node",
            f"each rank needs a GPU of its own: {hardware.name}",
            f"set cluster.nproc to {len(gpus)} or fewer, or run.device to cpu",
        )
    old = [gpu for gpu in gpus if gpu.compute_capability is not None and gpu.compute_capability < BF16_CAPABILITY]
    if config.precision.dtype == "bf16" and old:
        capability = ".".join(str(part) for part in old[0].compute_capability or ())
        yield Problem(
            "precision.dtype",
            f"bf16 on {old[0].name}",
            f"bf16 units begin with compute capability 8.0; this GPU has {capability}",
            "set precision.dtype to fp16 or fp32",
        )
