"""What a configuration should need of a rank's memory, to be shown beside what it measures. Torch-free."""

from __future__ import annotations

from distui.core.config.batch import solve_batch
from distui.core.config.schema import Config
from distui.core.hardware.detect import Hardware
from distui.core.plan.memory import EIGHT_BIT, OPTIMIZER_STATE_BYTES, Strategy, footprint
from distui.core.plan.rates import rates_of
from distui.core.plan.request import DEFAULT_MARGIN, Request
from distui.core.plan.search import BACKENDS, make_plan
from distui.core.plan.time import step_time
from distui.core.plan.types import ModelSpec, Plan


def optimizer_of(config: Config) -> str:
    """Return the planner's name of the configured optimizer: `adamw_8bit` where its moments are kept in 8 bits."""
    return config.optimizer.name + (EIGHT_BIT if config.optimizer.state_bits == 8 else "")


def strategy_of(config: Config, world_size: int) -> tuple[Strategy, bool]:
    """Return the planner's strategy of `config` over `world_size` ranks, and whether its micro-batch is known."""
    axes = config.strategy
    cut = axes.tensor_parallel * axes.pipeline_parallel * axes.context_parallel
    data_parallel = max(1, world_size // cut)
    batch = solve_batch(config.batch, data_parallel)
    strategy = Strategy(
        zero_stage=axes.zero_stage if world_size > 1 or config.offload.optimizer != "none" else 0,
        optimizer_home=config.offload.optimizer,
        params_home=config.offload.params,
        activation_checkpointing=config.activation_checkpointing.mode,
        micro_size=batch.micro_size or 1,
        accumulation=batch.accumulation or 1,
        tensor_parallel=axes.tensor_parallel,
        pipeline_parallel=axes.pipeline_parallel,
        data_parallel=data_parallel,
        dtype=config.precision.dtype,
        reduce_dtype=config.precision.reduce_dtype,
        optimizer=optimizer_of(config),
        context_parallel=axes.context_parallel,
        expert_parallel=axes.expert_parallel,
        compression=config.compression.gradients,
        backend=axes.backend,
        sequence_parallel=axes.sequence_parallel,
        pipeline_schedule=axes.pipeline_schedule,
        pipeline_chunks=axes.pipeline_chunks,
        mlp_tile=config.activation_checkpointing.mlp_tile,
        loss_tile=config.activation_checkpointing.loss_tile,
        shard_size=axes.shard_size if axes.shard_size < data_parallel else 0,
    )
    return strategy, batch.micro_size is not None


def plan_of(config: Config, model: ModelSpec, hardware: Hardware, ranks_per_node: int) -> Plan | None:
    """Return the plan of exactly this configuration, None where its backend or optimizer is not planned.

    An unset micro-batch counts as one sample. Raises: ConfigError where the batch sizes do not go together.
    """
    backend, optimizer = config.strategy.backend, optimizer_of(config)
    if backend not in BACKENDS or optimizer not in OPTIMIZER_STATE_BYTES:
        return None
    strategy, _ = strategy_of(config, ranks_per_node * hardware.nodes)
    request = Request(
        model=model,
        hardware=hardware,
        ranks_per_node=ranks_per_node,
        dtype=strategy.dtype,
        reduce_dtype=strategy.reduce_dtype,
        optimizer=optimizer,
        margin=DEFAULT_MARGIN,
        global_size=None,
        micro_size=strategy.micro_size,
        backends=(backend,),
        compressions=(strategy.compression,),
    )
    rates = rates_of(hardware, strategy.dtype, ranks_per_node)
    memory = footprint(model, strategy, rates.device_kind, rates.baseline_bytes)
    return make_plan(request, strategy, memory, step_time(model, strategy, rates))


def planned_memory(config: Config, model: ModelSpec, hardware: Hardware, world_size: int) -> dict[str, int]:
    """Return the bytes of a rank by category, as ranks report theirs; without a micro-batch no activations.

    A backend that a plug-in brings is not planned: empty.
    """
    if config.strategy.backend not in ("native", "ddp", "fsdp2", "deepspeed"):
        return {}
    strategy, knows_batch = strategy_of(config, world_size)
    memory = footprint(model, strategy, hardware.device_kind)
    planned = memory.by_category()
    # Ranks report logits with the activations, and what the framework takes as the rest of the process.
    planned["activations"] += planned.pop("logits")
    planned["other"] = planned.pop("framework")
    if not knows_batch:
        del planned["activations"]
    return {category: num_bytes for category, num_bytes in planned.items() if num_bytes}
