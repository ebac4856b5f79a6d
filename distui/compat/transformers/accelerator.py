"""What `Trainer` gets as its `Accelerator`: the face, with the strategy of the job and Trainer's own accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distui.compat.accelerate import Accelerator
from distui.compat.accelerate.data.loaders import PreparedDataLoader
from distui.compat.accelerate.utils.axes import ParallelismConfig
from distui.compat.accelerate.utils.dataclasses import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)
from distui.compat.not_offered import NotOffered
from distui.compat.transformers.arguments import own_parallelism, own_plugin
from distui.core.engine.job import job_config

_LOADER_OPTIONS = (
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "data_seed",
    "non_blocking",
)


class TrainerAccelerator(Accelerator):
    """Accelerate's face as `Trainer` uses it: it divides the loss and counts micro-batches itself."""

    def __init__(
        self,
        mixed_precision: Any = None,
        dataloader_config: Any = None,
        gradient_accumulation_plugin: Any = None,
        kwargs_handlers: Any = None,
        dynamo_plugin: Any = None,
        **strategies: Any,
    ) -> None:
        """Join the job. Collective. Arguments are those that Trainer passes, objects of the real Accelerate's.

        What TrainingArguments' deepspeed, fsdp and parallelism_config ask for is mapped onto the engine, and told in
        a line.

        Raises: NotOffered for axes that the engine does not have, and for a pipeline.
        """
        given = {name: value for name, value in strategies.items() if value is not None}
        if "fsdp_plugin" in given:
            given["fsdp_plugin"] = own_plugin(given["fsdp_plugin"])
        if "parallelism_config" in given:
            given["parallelism_config"] = own_parallelism(given["parallelism_config"])
        if "deepspeed_plugin" in given:
            mixed_precision = "no"  # the JSON has it: weights in half precision at stage 0 too
        options = {name: getattr(dataloader_config, name, None) for name in _LOADER_OPTIONS}
        config = job_config({})
        if (stages := config.strategy.pipeline_parallel) > 1:
            raise NotOffered(
                f"strategy.pipeline_parallel={stages} under transformers' Trainer is not offered by distui",
                "it calls the model once a micro-batch, and a pipeline runs those of a step in one call",
                "write the loop with distui.Engine, or set strategy.pipeline_parallel to 1",
            )
        # Trainer always says "no": what distui's configuration asks for counts unless it is at its default.
        by_config = mixed_precision == "no" or config.precision.dtype != "fp32"
        super().__init__(
            mixed_precision=None if by_config else mixed_precision,
            dataloader_config=DataLoaderConfiguration(
                **{name: value for name, value in options.items() if value is not None}
            ),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=1, sync_each_batch=bool(getattr(gradient_accumulation_plugin, "sync_each_batch", False))
            ),
            dynamo_plugin=_own_dynamo(dynamo_plugin),
            **given,
        )
        # Trainer would look for another engine's wrapper.
        self.state.deepspeed_plugins = self.state.fsdp_plugin = None
        self.state.distributed_type = self.state._partial.distributed_type
        for name in given:
            argument, asked = name.removesuffix("_plugin"), self.engine.config.summary()
            self.engine.print(f"distui: TrainingArguments({argument}=...) is obeyed by distui's own engine: {asked}")
        self.gradient_accumulation_steps = 1
        self.engine._micro_size = None  # TrainingArguments carry it: the loaders are right already
        self.micro_batches_of_step = 1
        """Micro-batches of the running step; Trainer has divided their losses by it, or by the tokens of all."""
        self.shows_axes = True
        """Whether Trainer may know that ranks share a batch."""
        self.evaluating = False
        """Whether the loaders that are read now are an evaluation's."""

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """What Trainer counts samples by: ranks that share a batch, as if all of them were tensor-parallel.

        It would cut sequences itself for those that share one; the model does.
        """
        shared = self.engine.num_processes // self.engine.num_data_ranks if self.shows_axes else 1
        return ParallelismConfig(self.engine.num_data_ranks, 1, tp_size=shared) if shared > 1 else None

    @property
    def weights_are_local(self) -> bool:
        """Whether each rank has every weight, so that `model.state_dict()` on one rank is whole and no collective."""
        config = self.engine.config
        split = max(config.strategy.tensor_parallel, config.strategy.pipeline_parallel, config.strategy.expert_parallel)
        by_stage = config.strategy.backend == "native" and config.strategy.zero_stage < 3
        return split == 1 and config.offload.params == "none" and (by_stage or config.strategy.backend == "ddp")

    def holds(self, model: nn.Module) -> bool:
        """Whether the engine prepared `model`."""
        return any(model is known for known in self.engine._models)

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """Return the weights of `model` as plain torch would save them; on other ranks than 0 they may be empty.

        Collective unless `weights_are_local`.
        """
        if self.weights_are_local:
            return dict(self.unwrap_model(model).state_dict())
        return self.engine.get_state_dict(model, only_rank_0=True)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Shard `model`; one that is only evaluated stays whole. Collective."""
        if evaluation_mode and not self.holds(model):
            self._models.append(model.to(self.device))
            return model
        return super().prepare_model(model, device_placement)

    def backward(self, loss: Any, **kwargs: Any) -> None:
        """Compute gradients of a loss that Trainer has divided. Collective."""
        super().backward(loss, **kwargs)
        if self.micro_batches_of_step > 1:  # whose mean is sent as the step's loss
            self.engine.clock.scale_last_loss(self.micro_batches_of_step)

    def _keep(self, loader: PreparedDataLoader) -> None:
        # Not into saved states: Trainer finds its place in an epoch by itself.
        clock = self.engine.clock
        loader.on_wait = lambda seconds: None if self.evaluating else clock.data_wait(seconds)
        loader.on_batch = lambda tokens, samples: None if self.evaluating else self._handed(tokens, samples)
        loader.watch = self.engine.step_end
        self._dataloaders.append(loader)

    def _handed(self, tokens: int, samples: int) -> None:
        # Trainer reads all micro-batches of a step before it runs the first: the clock would count the last only.
        clock = self.engine.clock
        clock.tokens += tokens
        clock.samples += samples

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared; models get their whole weights back. Collective."""
        held = [] if self.weights_are_local else [(m, self.engine.get_state_dict(m)) for m in self.engine._models]
        for model in self.engine._models:
            self.unwrap_model(model)  # waits for weights that are under way
        done = super().free_memory(*objects)
        for model, state in held:
            with torch.no_grad():
                for name, param in model.named_parameters():
                    param.data = state[name].to(device=self.device, dtype=param.dtype)
        return done


def _own_dynamo(plugin: Any) -> TorchDynamoPlugin | None:
    backend = str(getattr(plugin, "backend", "NO")).rpartition(".")[2].upper()
    if plugin is None or backend == "NO":
        return None
    return TorchDynamoPlugin(backend=backend, mode=plugin.mode, dynamic=plugin.dynamic)
