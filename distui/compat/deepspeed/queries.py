"""What scripts ask a DeepSpeed engine: its configuration, sizes and rates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distui.compat.deepspeed.configuration import DeepSpeedConfig
from distui.compat.not_offered import NotOffered
from distui.core.engine.engine import Engine
from distui.core.sharding.optim.prepared import PreparedOptimizer


class Queries:
    """The part of `DeepSpeedEngine` that answers; names are DeepSpeed's."""

    settings: DeepSpeedConfig
    engine: Engine
    optimizer: PreparedOptimizer | None

    @property
    def config(self) -> dict[str, Any]:
        """The JSON."""
        return self.settings.raw

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.engine.device

    @property
    def local_rank(self) -> int:
        """This rank among those of its node."""
        return self.engine.local_process_index

    @property
    def global_rank(self) -> int:
        """This rank over all nodes."""
        return self.engine.process_index

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.engine.num_processes

    @property
    def dp_world_size(self) -> int:
        """The number of data-parallel ranks: those with batches of their own."""
        return self.engine.num_data_ranks

    @property
    def data_parallel_group(self) -> Any:
        """The process group of the data-parallel ranks."""
        return self.engine.data_group or dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        """Return this rank among the data-parallel ones."""
        return self.engine.data_index

    def train_batch_size(self) -> int:
        """Return the samples in one step over all ranks."""
        return self.settings.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the samples in one forward of one rank."""
        return self.settings.micro_size

    def gradient_accumulation_steps(self) -> int:
        """Return the micro-batches in one step."""
        return self.settings.accumulation

    def managed_gradient_accumulation(self) -> bool:
        """Return whether the accumulation steps tell where a step ends; else every `step()` is one."""
        return self.settings.managed

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return train batch size, micro-batch size and accumulation steps."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples in one step, by the number of micro-batches. Raises ValueError where they do not fit."""
        each = self.settings.micro_size * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % each:
            raise ValueError(
                f"train_batch_size={train_batch_size} is no multiple of micro-batch x ranks = "
                f"{self.settings.micro_size} x {self.dp_world_size} = {each}"
            )
        self.settings.train_batch_size = train_batch_size
        self.settings.accumulation = train_batch_size // each
        if self.engine.config.strategy.pipeline_parallel == 1:  # a pipeline's micro-batches are no steps of the engine
            self.engine.gradient_accumulation_steps = self.settings.accumulation

    def zero_optimization(self) -> bool:
        """Return whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage that runs."""
        return self.engine.config.strategy.zero_stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Return whether gradients are sharded."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Return whether parameters are sharded."""
        return self.zero_optimization_stage() >= 3

    def fp16_enabled(self) -> bool:
        """Return whether it computes in fp16."""
        return self.engine.config.precision.dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Return whether it computes in bf16."""
        return self.engine.config.precision.dtype == "bf16"

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the formats of the parameters and of the accumulated gradients."""
        precision = self.engine.config.precision
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.dtype]
        return dtype, torch.float32 if precision.reduce_dtype == "fp32" else dtype

    def gradient_clipping(self) -> float:
        """Return the norm that gradients are clipped to; 0 is no clipping."""
        return self.engine.config.optimizer.max_grad_norm

    def dynamic_loss_scale(self) -> bool:
        """Return whether the loss scale moves."""
        return self.engine.scaler is not None and not getattr(self.engine.scaler, "is_static", False)

    def loss_scale(self) -> float:
        """Return the current loss scale, 1 where there is none."""
        return self.engine.scaler.scale if self.engine.scaler is not None else 1.0

    def steps_per_print(self) -> int | None:
        """Return how often a line is printed."""
        value = self.settings.get("steps_per_print")
        return int(value) if value else None

    def wall_clock_breakdown(self) -> bool:
        """Return whether the times of each step are printed."""
        return bool(self.settings.get("wall_clock_breakdown", False))

    def optimizer_name(self) -> str | None:
        """Return the name of the JSON's optimizer."""
        return self.settings.get("optimizer.type")

    def optimizer_params(self) -> dict[str, Any] | None:
        """Return the parameters of the JSON's optimizer."""
        return self.settings.section("optimizer").get("params")

    def scheduler_name(self) -> str | None:
        """Return the name of the JSON's schedule."""
        return self.settings.get("scheduler.type")

    def scheduler_params(self) -> dict[str, Any] | None:
        """Return the parameters of the JSON's schedule."""
        return self.settings.section("scheduler").get("params")

    def _of_groups(self, key: str) -> list[Any]:
        return [group.get(key, 0.0) for group in self.optimizer.param_groups] if self.optimizer is not None else []

    def get_lr(self) -> list[Any]:
        """Return every parameter group's learning rate."""
        return self._of_groups("lr")

    def get_mom(self) -> list[Any]:
        """Return every parameter group's momentum or betas."""
        return self._of_groups("momentum" if self.optimizer_name() in ("SGD", "RMSprop") else "betas")

    def get_type(self) -> list[Any]:
        """Return every parameter group's type, where it has one."""
        return self._of_groups("type")

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Refused: homes are chosen when the engine is built."""
        raise NotOffered(
            "DeepSpeedEngine.offload_states is not offered by distui",
            "where a state lives is fixed when the engine is built",
            'set "offload_optimizer": {"device": "cpu"} in zero_optimization',
        )

    reload_states = offload_states

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it is the pipeline engine's."""
        raise NotOffered(
            "train_batch of a model that is no PipelineModule",
            "it belongs to DeepSpeed's PipelineModule",
            "give initialize a PipelineModule, or write the loop: loss = engine(batch); engine.backward(loss); "
            "engine.step()",
        )

    eval_batch = train_batch
