"""The part of `Accelerator` that runs a training step: accumulation, backward, clipping, autocast."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.compat.accelerate.arguments import Handlers
from distui.compat.accelerate.data.loaders import DataLoaderDispatcher, PreparedDataLoader
from distui.compat.accelerate.given import Given
from distui.compat.accelerate.logging import get_logger
from distui.compat.accelerate.ranks import Ranks
from distui.compat.accelerate.refusals import refuse_argument
from distui.compat.accelerate.utils.dataclasses import AutocastKwargs, ProfileKwargs
from distui.compat.accelerate.utils.enums import DistributedType

logger = get_logger("accelerate.accelerator")


class NoteSync:
    """A forward hook that notes whether a forward ran under `no_sync`; it stays behind when a model is copied."""

    def __init__(self, accelerator: Steps | None) -> None:
        self._accelerator = accelerator

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._accelerator is not None and torch.is_grad_enabled():
            self._accelerator._forward_without_sync = self._accelerator._inside_no_sync

    def __reduce__(self) -> Any:
        return NoteSync, (None,)


class ModelNoSync:
    """A prepared model's `no_sync`, as DDP's wrapper has it; a copy of the model sends nothing anyway."""

    def __init__(self, accelerator: Steps | None) -> None:
        self._accelerator = accelerator

    def __call__(self) -> AbstractContextManager[None]:
        return self._accelerator.no_sync() if self._accelerator is not None else nullcontext()

    def __reduce__(self) -> Any:
        return ModelNoSync, (None,)


class Steps(Ranks, Given):
    """Runs micro-batches of an optimizer step."""

    handlers: Handlers
    step: int
    _sync_each_batch: bool
    _dataloaders: list[PreparedDataLoader]
    _models: list[nn.Module]

    def __init__(self) -> None:
        self._forward_without_sync = False
        """Whether the last forward of a prepared model ran under `no_sync`: its backward then sends nothing."""
        self._inside_no_sync = False

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch is the last of an optimizer step."""
        return bool(self.gradient_state.sync_gradients)

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state._set_sync_gradients(sync_gradients)

    def _on_sync_gradients(self, sync_gradients: bool) -> None:
        self.engine.sync_gradients = sync_gradients
        self._send(sync_gradients or self._sync_each_batch)

    def _send(self, sync: bool) -> None:
        self.engine.backend.set_sync(sync and not self._inside_no_sync)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, gradient_accumulation_steps: int) -> None:
        self.gradient_state.plugin_kwargs["num_steps"] = gradient_accumulation_steps
        self.engine.gradient_accumulation_steps = gradient_accumulation_steps

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Run one micro-batch; the optimizer steps on the last of a step, or of the loader."""
        self.engine.step_end.working()
        state = self.gradient_state
        if state.sync_with_dataloader and state.end_of_dataloader:
            self.step, sync = 0, True
        else:
            self.step += 1
            sync = self.step % state.num_steps == 0
        state._set_sync_gradients(sync)
        yield

    @contextmanager
    def no_sync(self, model: Any = None) -> Iterator[None]:
        """Send nothing in the backward passes of what runs forward inside; the optimizer may step all the same."""
        before, self._inside_no_sync = self._inside_no_sync, True
        self._send(False)
        try:
            yield
        finally:
            self._inside_no_sync = before
            self._send(self.sync_gradients or self._sync_each_batch)

    @contextmanager
    def trigger_sync_in_backward(self, model: Any) -> Iterator[None]:
        """Send gradients in the backward passes inside, also of forwards that ran under `no_sync`."""
        self._forward_without_sync = False
        self.engine.backend.set_sync(True)
        try:
            yield
        finally:
            self._send(self.sync_gradients or self._sync_each_batch)

    def backward(self, loss: Any, **kwargs: Any) -> None:
        """Compute gradients of `loss` over the accumulation steps. Collective."""
        if kwargs.pop("learning_rate", None) is not None:
            raise refuse_argument(
                "Accelerator.backward", "learning_rate", "...", "use an optimizer with a step of its own"
            )
        held_back = self._forward_without_sync
        if held_back:
            self.engine.backend.set_sync(False)
        self.engine.backward(loss, **kwargs)
        if held_back:
            self._send(self.sync_gradients or self._sync_each_batch)
        for schedule in self._schedules():
            # Native, stage 0: param.grad can be read while gradients accumulate too, as this rank's part.
            schedule.show_gradients()

    def _schedules(self) -> list[Any]:
        """Return the native engine's schedules; none for another backend."""
        prepared = getattr(self.engine.backend, "_models", {})
        found = prepared.values() if isinstance(prepared, dict) else ()
        return [sharded.schedule for sharded in found if hasattr(sharded, "schedule")]

    @contextmanager
    def maybe_context_parallel(
        self, buffers: Any = None, buffer_seq_dims: Any = None, no_restore_buffers: Any = None
    ) -> Iterator[None]:
        """Nothing: the model itself cuts what it is given, and the buffers stay whole."""
        if self.engine.config.strategy.context_parallel == 1:
            logger.warning_once(
                "Context parallel training is not enabled. This context manager will have no effect. "
                "To enable it, set `parallelism_config.cp_size` > 1 in the `Accelerator` constructor."
            )
        yield

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide the loss scale out of the gradients (fp16)."""
        self.engine._unscale()

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip by the global norm and return it; while gradients accumulate nothing is clipped, and it is nan."""
        norm = self.engine.clip_grad_norm_(parameters, max_norm, norm_type)
        return norm if norm is not None else torch.tensor(float("nan"))

    def clip_grad_value_(self, parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
        """Clamp every gradient element."""
        self.engine.clip_grad_value_(parameters, clip_value)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Cast operations inside to the format of `mixed_precision`."""
        handler = autocast_handler or self.handlers.autocast or AutocastKwargs()
        options = {key: value for key, value in handler.to_dict().items() if value is not None}
        context: AbstractContextManager[Any] = self.engine.autocast()
        if self._autocast_dtype is not None:
            context = torch.autocast(self.device.type, dtype=torch.bfloat16, **options)
        elif not handler.enabled:
            context = torch.autocast(self.device.type, enabled=False)
        with context:
            yield

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[Any]:
        """Profile the block with torch's profiler; a trace a rank is written where `output_trace_dir` says."""
        handler = profile_handler or self.handlers.profile or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            Path(handler.output_trace_dir).mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(Path(handler.output_trace_dir) / f"profile_{self.process_index}.json"))
        self.wait_for_everyone()

    @contextmanager
    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Iterator[None]:
        """Iterate loaders without evening them out: for evaluation, and at one rank.

        Raises: NotOffered where ranks run unequal numbers of training steps, before any of them hangs.
        """
        if not self.multi_device:
            if self.distributed_type != DistributedType.NO:
                warnings.warn(
                    "Joining uneven inputs is only supported for multi-GPU training, as a result `join_uneven_inputs` "
                    "will have no effect.",
                    stacklevel=3,
                )
            with contextlib.nullcontext(joinables):
                yield
            return
        overridden: list[tuple[Any, bool]] = []
        if even_batches is not None:
            if any(isinstance(loader, DataLoaderDispatcher) for loader in self._dataloaders):
                warnings.warn(
                    "Overriding even_batches is only supported for map-style datasets, yet some dataloaders given "
                    "were iterable",
                    stacklevel=3,
                )
            for loader in self._dataloaders:
                batches: Any = loader.batch_sampler
                if hasattr(batches, "even_batches"):
                    overridden.append((batches, batches.even_batches))
                    batches.even_batches = even_batches
        uneven = not (self.even_batches if even_batches is None else even_batches)
        try:
            from distui.compat.accelerate.data.joining import joining

            with joining(self, self._models) if uneven else nullcontext():
                yield
        finally:
            for batches, before in overridden:
                batches.even_batches = before
