"""The five-line API: `distui.Engine`.

    engine = distui.Engine()
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    for batch in loader:
        with engine.accumulate(model):
            loss = model(**batch).loss
            engine.backward(loss)
            engine.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

Names and semantics follow Accelerate's `Accelerator` wherever it has a name for the thing.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from distui.core import ops
from distui.core.activation_checkpointing import apply_activation_checkpointing, remove_activation_checkpointing
from distui.core.backends.base import Backend
from distui.core.backends.optimizer import PreparedOptimizer, unscale
from distui.core.backends.registry import load_backend
from distui.core.batch import solve_batch
from distui.core.config import Config
from distui.core.control import StepControl
from distui.core.data.loader import PreparedLoader, prepare_loader, skip_first_batches
from distui.core.flops import FlopMeter, device_peak_flops
from distui.core.job import job_config, job_telemetry
from distui.core.paths import current_run
from distui.core.precision import DTYPES
from distui.core.process import ProcessState
from distui.core.scheduler import PreparedScheduler
from distui.core.states import States
from distui.core.step_clock import StepClock


class Engine(States, ProcessState):
    """Trains any model on the ranks that `distui launch` started; outside of it, on one process.

    Keyword arguments are sections of the configuration as dicts, and win over it:
    `Engine(strategy={"zero_stage": 3}, precision={"dtype": "bf16"})`. Several engines may live in one process.
    """

    def __init__(self, **sections: Mapping[str, Any]) -> None:
        """Join the job. Collective: all ranks. Raises ConfigError with every problem of the configuration."""
        self.config: Config = job_config(sections)
        ProcessState.__init__(self)
        States.__init__(self)
        batch = solve_batch(self.config.batch, self.num_processes)
        self.gradient_accumulation_steps: int = batch.accumulation or 1
        self._micro_size = batch.micro_size
        if self._micro_size is None and batch.global_size is not None:
            self._micro_size = batch.global_size // (self.num_processes * self.gradient_accumulation_steps)
        group = torch.distributed.group.WORLD if self.num_processes > 1 else None
        self.telemetry = job_telemetry(self.process_index, self.local_process_index, self.num_processes)
        self.backend: Backend = load_backend(self.config, group)
        flops = FlopMeter(
            self.telemetry,
            dtype=self.config.precision.dtype,
            on_dtype=self._say_started,
            profile=self.config.telemetry.profile_flops,
            writes=self.is_main_process,
        )
        self.clock = StepClock(self.telemetry, self.backend.take_exposed_s, flops)
        self.scaler = self.backend.loss_scaler()
        self.sync_gradients = True
        """Whether the current micro-batch is the last before the optimizer steps."""
        self._micro_step = 0
        self._norm_of_step: torch.Tensor | None = None
        self._watching: list[Any] = []
        self._stepped: list[PreparedOptimizer] = []
        self._models: list[nn.Module] = []
        self._optimizers: list[PreparedOptimizer] = []
        self._schedulers: list[PreparedScheduler] = []
        self._loaders: list[PreparedLoader] = []
        run = current_run()
        self._control = StepControl(self, run) if run is not None else None

    # ---- prepare -------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Make models, optimizers, loaders and schedulers work on all ranks, and return them in the same order.

        Other objects come back as they are. Collective: all ranks, with the same kinds in the same order.
        """
        prepared: dict[int, Any] = {}
        kinds: list[tuple[type, Callable[[Any], Any]]] = [
            (nn.Module, self.prepare_model),
            (torch.optim.Optimizer, self.prepare_optimizer),
            (torch.utils.data.DataLoader, self.prepare_data_loader),
            (torch.optim.lr_scheduler.LRScheduler, self.prepare_scheduler),
        ]
        # Models first: an optimizer is bound to the flat shards of its model.
        for kind, prepare in kinds:
            for index, value in enumerate(objects):
                if isinstance(value, kind):
                    prepared[index] = prepare(value)
        results = tuple(prepared.get(index, value) for index, value in enumerate(objects))
        self._report_memory()
        return results[0] if len(results) == 1 else results

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device and shard it by the configured stage. Collective."""
        if any(model is known for known in self._models):
            return model
        model.to(self.device)
        apply_activation_checkpointing(model, self.config.activation_checkpointing.mode)
        prepared = self.backend.prepare_model(model)
        self._watching += self.clock.watch(prepared)
        self._models.append(prepared)
        self._say_started(self.config.precision.dtype)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """Make `optimizer` step this rank's shards. Collective."""
        if isinstance(optimizer, PreparedOptimizer):
            return optimizer
        prepared = self.backend.prepare_optimizer(optimizer)
        prepared.step_allowed = lambda: self.sync_gradients
        prepared.before_step = self._before_step
        prepared.after_step = self._after_step
        self._optimizers.append(prepared)
        return prepared

    def prepare_data_loader(self, loader: Any) -> PreparedLoader:
        """Give each rank its slice of every global batch."""
        if isinstance(loader, PreparedLoader):
            return loader
        prepared = prepare_loader(
            loader,
            process=self,
            micro_size=self._micro_size,
            accumulation=self.gradient_accumulation_steps,
            seed=self.config.run.seed,
            on_wait=self.clock.data_wait,
            device=self.device,
        )
        prepared.on_batch = self.clock.batch
        self._loaders.append(prepared)
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> PreparedLoader:
        """Return a view of `dataloader` that leaves out its first batches, to go on in the middle of an epoch."""
        return skip_first_batches(self.prepare_data_loader(dataloader), num_batches)

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """Make `scheduler` step once an optimizer step, and not when that was skipped."""
        if isinstance(scheduler, PreparedScheduler):
            return scheduler
        prepared = PreparedScheduler(
            scheduler,
            did_step=lambda: not self.optimizer_step_was_skipped,
            sync_gradients=lambda: self.sync_gradients,
        )
        self._schedulers.append(prepared)
        return prepared

    # ---- a training step -----------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Run one micro-batch; gradients travel and the optimizer steps on the last of a step, or of the loader."""
        self._micro_step += 1
        at_end = bool(self.active_loaders) and self.active_loaders[-1].end_of_dataloader
        if at_end or self._micro_step % self.gradient_accumulation_steps == 0:
            self._micro_step = 0
            self._set_sync(True)
        else:
            self._set_sync(False)
        yield

    @contextmanager
    def no_sync(self, model: nn.Module | None = None) -> Iterator[None]:
        """Keep the gradients of the backward passes inside local (stages 2 and 3 still reduce into their shards)."""
        before = self.sync_gradients
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(before)

    def _set_sync(self, sync: bool) -> None:
        self.sync_gradients = sync
        self.backend.set_sync(sync)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients, averaged over ranks and micro-batches. Collective: all ranks.

        `loss` is the mean over this rank's micro-batch; kwargs go to `loss.backward`.
        """
        if self._stepped:
            self._finish_step()
        begin = time.perf_counter()
        self.telemetry.phase("backward")
        self.backend.before_backward()
        factor = 1.0 / self.gradient_accumulation_steps
        if self.scaler is not None:
            factor *= self.scaler.scale
        with self.clock.flops.backward(bool(kwargs.get("create_graph"))):
            self.backend.backward(loss, factor, **kwargs)
        self.backend.end_backward()
        self.clock.backward(begin, loss)
        self.telemetry.phase("idle")

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor | None:
        """Clip gradients by their global norm and return the norm before; None while gradients accumulate.

        Collective: all ranks.
        """
        if not self.sync_gradients:
            return None
        begin = time.perf_counter()
        self._unscale()
        params = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        norm = self.backend.clip_grad_norm_(params, max_norm, float(norm_type))
        self._norm_of_step = norm
        self.clock.grad_norm = norm.item()
        self.clock.optimizer_s += time.perf_counter() - begin
        return norm

    def clip_grad_value_(self, parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
        """Clamp every gradient element to [-clip_value, clip_value]. Collective: all ranks."""
        if self.sync_gradients:
            self._unscale()
            for optimizer in self._optimizers:
                optimizer.clamp_gradients(clip_value)

    def _unscale(self) -> None:
        if self.scaler is None:
            return
        for optimizer in self._optimizers:
            unscale(optimizer, self.scaler.scale)

    def _before_step(self, optimizer: PreparedOptimizer) -> None:
        self.telemetry.phase("optimizer")
        self._step_begin = time.perf_counter()
        max_norm = self.config.optimizer.max_grad_norm
        if max_norm and self._norm_of_step is None:
            self.clip_grad_norm_([param for model in self._models for param in model.parameters()], max_norm)
        if self.scaler is not None:
            self._unscale()
            # The norm that a script clipped by may be of some parameters only.
            norms = [optimizer.grad_norm(None, 2.0)]
            if self._norm_of_step is not None:
                norms.append(self._norm_of_step)
            optimizer.skip_next = not all(bool(torch.isfinite(norm)) for norm in norms)

    def _after_step(self, optimizer: PreparedOptimizer) -> None:
        self._stepped.append(optimizer)
        if all(any(sibling is stepped for stepped in self._stepped) for sibling in optimizer.siblings):
            self._finish_step()

    def _finish_step(self) -> None:
        """Account a step, once all optimizers of its model have stepped, or the next backward begins."""
        stepped, self._stepped = self._stepped, []
        skipped = any(optimizer.step_was_skipped for optimizer in stepped)
        if self.scaler is not None:
            self.scaler.update(overflow=skipped)
        self._norm_of_step = None
        groups = stepped[0].param_groups
        self.clock.end_step(
            self._step_begin,
            learning_rate=float(groups[0]["lr"]) if groups and "lr" in groups[0] else None,
            loss_scale=self.scaler.scale if self.scaler is not None else None,
            skipped=skipped,
        )
        if self.config.checkpoint.every_steps:
            self.saver.after_step(self)
        if self._control is not None:
            self._control.after_step()
        if self.clock.step in (1, 2) or self.clock.step % 50 == 0:
            self._report_memory()

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step was skipped by an overflow (fp16)."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the configured format where operations allow it; does nothing under fp32."""
        dtype = self.config.precision.dtype
        if dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[dtype])

    # ---- across ranks --------------------------------------------------------------------------------------------

    def gather(self, tensors: Any) -> Any:
        """Concatenate every rank's tensors along dimension 0. Collective."""
        return ops.gather(tensors)

    def gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """Gather, without the samples that were repeated to even out the last batch. Collective."""
        num_real = self.active_loaders[-1].remainder if self.active_loaders else -1
        return ops.gather_for_metrics(data, num_real, use_gather_object)

    def reduce(self, tensors: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum or average every rank's tensors. Collective."""
        return ops.reduce(tensors, reduction, scale)

    def pad_across_processes(self, tensors: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad to the largest size over ranks along `dim`. Collective."""
        return ops.pad_across_processes(tensors, dim, pad_index, pad_first)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared; returns a None for each object, to rebind the names. Collective.

        The models get their own hooks and forwards back; at stage 3, where a rank has a part of each, they are empty.
        """
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        for model in self._models:
            remove_activation_checkpointing(model)
        for held in (self._models, self._optimizers, self._schedulers, self._loaders):
            held.clear()
        self.backend.free()
        self.backend = load_backend(self.config, self.backend.group)
        return [None for _ in objects]

    def _say_started(self, dtype: str) -> None:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else platform.processor()
        num_parameters = sum(param.numel() for model in self._models for param in model.parameters())
        self.telemetry.rank_started(str(self.device), name, num_parameters, device_peak_flops(self.device, dtype))
