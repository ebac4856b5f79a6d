"""`PipelineEngine`: whole steps of a `PipelineModule` on the engine's pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from distui.compat.deepspeed.engine import DeepSpeedEngine
from distui.compat.deepspeed.loading import RepeatingLoader
from distui.compat.deepspeed.runtime.pipe.module import PipelineError, PipelineModule
from distui.core.errors import UserError
from distui.core.parallel.batches import CutBatch
from distui.core.ranks import ops


class Held:
    """Labels on their way to the loss: no tensor that a model's border would cast."""

    def __init__(self, value: Any) -> None:
        self.value = value


def loss_of(module: PipelineModule) -> Any:
    """Return the loss of a model's output, for `engine.prepare_model(loss=...)`; None where its output is the loss."""
    given = module.loss_fn
    if given is None:
        return None

    def loss(output: Any, pipeline_labels: Held) -> torch.Tensor:
        return given(output, pipeline_labels.value)

    return loss


class PipelineEngine(DeepSpeedEngine):
    """What `deepspeed.initialize` makes of a `PipelineModule`: steps are `train_batch`, not forward and backward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipelined: PipelineModule = self.module  # type: ignore[assignment]
        self.grid = self.pipelined.mpu()
        self.grid.axes = self.engine.backend.axes
        self.num_stages, self.stage_id = self.grid.pipe_parallel_size, self.grid.get_stage_id()
        self.is_pipe_parallel = self.num_stages > 1
        self.is_data_parallel, self.is_model_parallel = self.dp_world_size > 1, False
        self.data_iterator: Iterator[Any] | None = None
        self.batch_fn: Any = None
        self.agg_train_loss: torch.Tensor | None = None

    @property
    def mpu(self) -> Any:
        """The topology's grid."""
        return self.grid

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.gradient_accumulation_steps()

    @property
    def micro_batch_size(self) -> int:
        """Samples in a micro-batch."""
        return self.train_micro_batch_size_per_gpu()

    def is_first_stage(self) -> bool:
        """Return whether this rank has the first layer."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Return whether this rank has the last layer, and the loss."""
        return self.stage_id == self.num_stages - 1

    def get_pipeline_parallel_rank(self) -> int:
        """Return this rank's stage."""
        return self.stage_id

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return True: every call is a whole step."""
        return True

    # ---- data ------------------------------------------------------------------------------------------------------

    def set_dataloader(self, loader: Any) -> None:
        """Take batches from a loader."""
        self.training_dataloader = loader
        self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Any) -> None:
        """Take batches from an iterator; only the first and the last stage do."""
        self.training_dataloader, self.data_iterator = None, iterator

    def set_batch_fn(self, fn: Any) -> None:
        """Have each batch go through a function."""
        self.batch_fn = fn

    def set_has_attention_mask(self, value: bool) -> None:
        """Nothing: any tensors travel between stages."""

    def reset_activation_shape(self) -> None:
        """Nothing: shapes travel with every micro-batch."""

    def read_from(self, dataset: Any) -> None:
        """Take batches of a data set, in its order and for ever, as DeepSpeed does."""
        sampler: Any = DistributedSampler(dataset, self.dp_world_size, self.get_data_parallel_rank(), shuffle=False)
        self.set_dataloader(RepeatingLoader(self.deepspeed_io(dataset, data_sampler=sampler)))

    def _micro_batches(self, count: int) -> list[tuple[Any, Any]]:
        """Return (inputs, labels) of so many micro-batches, on this device; None on a stage in the middle.

        Raises: UserError where an end of the pipeline has nothing to read; StopIteration at the end of the data.
        """
        if not (self.is_first_stage() or self.is_last_stage()):
            return [(None, None)] * count
        found = []
        for _ in range(count):
            if self.data_iterator is None:
                raise UserError(
                    "train_batch has no data",
                    f"stage {self.stage_id} of {self.num_stages} reads it, and was given no iterator",
                    "call train_batch(data_iter=iter(loader)), or give deepspeed.initialize training_data",
                )
            batch = next(self.data_iterator)
            batch = self.batch_fn(batch) if self.batch_fn is not None else batch
            inputs, labels = (_tensors(part, self.device) for part in (batch[0], batch[1]))
            found.append((inputs, labels))
        return found

    # ---- steps -----------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Any = None) -> torch.Tensor:
        """Run a whole step over `gradient_accumulation_steps` micro-batches; return their mean loss. Collective.

        It is the mean over data-parallel ranks too, on all ranks.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        optimizer = self._need_optimizer("train_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.train()
        self._advance_curricula()
        batches = self._micro_batches(self.micro_batches)
        self._step_applied = False
        self.engine._set_sync(False)
        self.engine.backend.weigh(self._sum_factor)
        loss = self._whole(batches) if self.is_pipe_parallel else self._in_turn(batches)
        self._take_step(optimizer, None)
        self.micro_steps += len(batches)
        self.agg_train_loss = ops.reduce(loss.detach(), "mean", group=self.engine.data_group)
        if self.monitor.enabled:
            self.monitor.step([self.agg_train_loss], self.get_lr(), self.global_samples)
        every = self.steps_per_print()
        if every and self.global_steps % every == 0:
            self.engine.print(f"steps: {self.global_steps} loss: {float(self.agg_train_loss):0.4f}")
        return self.agg_train_loss

    def _loss(self, inputs: Any, labels: Any) -> torch.Tensor:
        given = {} if self.pipelined.loss_fn is None else {"pipeline_labels": Held(labels)}
        loss: torch.Tensor = self.module(inputs, **given)
        return loss

    def _whole(self, batches: list[tuple[Any, Any]]) -> torch.Tensor:
        """Have the schedule run all micro-batches, with their backward passes."""
        has_loss = self.pipelined.loss_fn is not None
        cut = CutBatch(
            ((inputs,), {}, {"pipeline_labels": Held(labels)} if has_loss else {}) for inputs, labels in batches
        )
        self.engine._set_sync(True)
        loss: Any = self.module(cut)
        self.engine.backward(loss)
        return torch.as_tensor(loss)

    def _in_turn(self, batches: list[tuple[Any, Any]]) -> torch.Tensor:
        losses = []
        for number, (inputs, labels) in enumerate(batches, 1):
            self.engine._set_sync(number == len(batches))
            loss = self._loss(inputs, labels)
            self.engine.backward(loss, micro_batches=len(batches))
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def eval_batch(
        self,
        data_iter: Any,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Return the mean loss of some micro-batches, without gradients; with `return_logits` also the last output.

        Without `bcast_loss`, and of what is no loss, the last stage only. Collective: all ranks.
        """
        before, self.data_iterator = self.data_iterator, data_iter
        self.eval()
        found: list[Any] = []
        outputs = None
        try:
            for inputs, labels in self._micro_batches(num_micro_batches or self.micro_batches):
                outputs = self.module(inputs)
                if self.is_last_stage():
                    has_loss = compute_loss and self.pipelined.loss_fn is not None
                    found.append(self.pipelined.loss_fn(outputs, labels) if has_loss else outputs)  # type: ignore[misc]
        finally:
            self.data_iterator = before
        result = self._reduced(found, reduce_output) if self.is_last_stage() else None
        if compute_loss and bcast_loss and self.is_pipe_parallel:
            number = torch.zeros((), device=self.device) if result is None else result.detach().float().reshape(())
            dist.broadcast(number, src=self.grid.stage_to_global(self.num_stages - 1), group=self._pipe())
            result = number
        if not return_logits:
            return result
        return result, outputs if self.is_last_stage() else None

    def _pipe(self) -> Any:
        axes = self.engine.backend.axes
        assert axes is not None
        return axes["pp"]

    def _reduced(self, found: list[Any], how: str | None) -> Any:
        if how is None:
            return found
        if how.lower() != "avg":
            raise NotImplementedError(f"reduction type {how} not supported.")
        mean = torch.stack([value.detach().float() for value in found]).mean(0)
        return ops.reduce(mean, "mean", group=self.engine.data_group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as by DeepSpeed. See `train_batch`."""
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as by DeepSpeed. See `train_batch`."""
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as by DeepSpeed. See `train_batch`."""
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")


def _tensors(part: Any, device: torch.device) -> Any:
    if isinstance(part, torch.Tensor):
        return part.detach().to(device)
    if isinstance(part, (tuple, list)):  # a loader makes lists of tuples
        return tuple(_tensors(value, device) for value in part)
    return part
