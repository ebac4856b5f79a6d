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

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distui.core.backends.base import Backend
from distui.core.config.schema import Config
from distui.core.data.loader import PreparedLoader, prepare_loader, skip_first_batches
from distui.core.engine.axes import backend_of, batch_sizes, cutting_group, join_axes, share_of_batch, take_given
from distui.core.engine.batches import note_loader
from distui.core.engine.clipping import route_clipping
from distui.core.engine.control import StepControl
from distui.core.engine.job import job_config, job_telemetry
from distui.core.engine.left_out import watch_steps
from distui.core.engine.scheduler import PreparedScheduler
from distui.core.engine.started import say_started
from distui.core.engine.states import States
from distui.core.engine.step_clock import StepClock
from distui.core.engine.without_sync import step_allowed, without_sync, zeroing_allowed
from distui.core.errors import UserError
from distui.core.model.activation_checkpointing import apply_recomputation, remove_activation_checkpointing
from distui.core.model.flops import FlopMeter
from distui.core.paths import current_run
from distui.core.ranks import streams
from distui.core.ranks.precision import DTYPES, LossScaler
from distui.core.ranks.process import ProcessState
from distui.core.sharding.optim.prepared import PreparedOptimizer, optimizers_of_parameters, unscale
from distui.core.sharding.start.initialise import Init
from distui.core.sharding.start.start import Start


class Engine(States, ProcessState):
    """Trains any model on the ranks that `distui launch` started; outside of it, on one process.

    Keyword arguments are sections of the configuration as dicts, and win over it:
    `Engine(strategy={"zero_stage": 3}, precision={"dtype": "bf16"})`. Several engines may live in one process.
    """

    def __init__(self, *, total_steps: int = 0, num_epochs: int = 0, **sections: Mapping[str, Any]) -> None:
        """Join the job, of so many steps, or epochs of the first sized loader. Collective. Raises ConfigError."""
        self.config: Config = job_config(sections)
        ProcessState.__init__(self, self.config.run.device)
        States.__init__(self)
        axes = join_axes(self, self.config)
        sizes = batch_sizes(self.config, self.num_data_ranks)
        self._micro_size, self.gradient_accumulation_steps, self.num_micro = sizes
        group = torch.distributed.group.WORLD if self.num_processes > 1 else None
        self.telemetry = job_telemetry(self.process_index, self.local_process_index, self.num_processes)
        self.telemetry.total_steps, self._num_epochs = total_steps, num_epochs
        self.backend: Backend = backend_of(self, group if axes is None else axes["average"], axes)
        flops = FlopMeter(
            self.telemetry,
            dtype=self.config.precision.dtype,
            on_dtype=functools.partial(say_started, self),
            profile=self.config.telemetry.profile_flops,
            writes=self.is_main_process,
        )
        self.clock = StepClock(self.telemetry, self.backend.take_exposed_s, flops, share_of_batch(axes))
        self.clock.before_training = self.step_end.working
        scale = self.config.precision
        self.scaler = LossScaler(scale.initial_loss_scale, scale.loss_scale_window) if scale.dtype == "fp16" else None
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

    def prepare(
        self,
        *objects: Any,
        init: Init | None = None,
        weights: str | Path | None = None,
        plan: Mapping[str, str] | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
    ) -> Any:
        """Make models, optimizers, loaders and schedulers work on all ranks, and return them in the same order.

        Other objects come back as they are. All keywords are for the model, see `prepare_model`.
        Collective: all ranks, with the same kinds in the same order.

        Raises: UserError for weights without a model, or for several.
        """
        num_models = sum(isinstance(value, nn.Module) for value in objects)
        if weights is not None and num_models != 1:
            what, fix = f"weights={str(weights)!r} for {num_models} models", "prepare each with engine.prepare_model"
            raise UserError(what, "one folder holds the weights of one model", f"{fix}(model, weights=...)")
        prepared: dict[int, Any] = {}
        kinds: list[tuple[type, Callable[[Any], Any]]] = [
            (nn.Module, functools.partial(self.prepare_model, init=init, weights=weights, plan=plan, loss=loss)),
            (torch.optim.Optimizer, self.prepare_optimizer),
            (torch.utils.data.DataLoader, self.prepare_data_loader),
            (torch.optim.lr_scheduler.LRScheduler, self.prepare_scheduler),
        ]
        # Models first: an optimizer is bound to the flat shards of its model.
        self.backend.optimizer_of = optimizers_of_parameters(objects)
        for kind, prepare in kinds:
            for index, value in enumerate(objects):
                if isinstance(value, kind):
                    prepared[index] = prepare(value)
        results = tuple(prepared.get(index, value) for index, value in enumerate(objects))
        self._report_memory()
        return results[0] if len(results) == 1 else results

    def prepare_model(
        self,
        model: nn.Module,
        *,
        init: Init | None = None,
        weights: str | Path | None = None,
        strict: bool = True,
        plan: Mapping[str, str] | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
    ) -> nn.Module:
        """Move `model` to the device and shard it by the configured stage, a unit at a time. Collective.

        All ranks begin with rank 0's numbers. Where `weights` names safetensors (a file or a folder), they come from
        there, and at stage 3 each rank reads only its part; with `strict=False` the files may lack some, or have more.
        What is on the meta device (`distui.init_empty_weights`) and in no file is initialised by its module's own
        `reset_parameters`, by the model's `_init_weights(module)`, then by `init(module)`: the same on any number of
        ranks, by `run.seed`. `plan` says how tensor-parallel ranks cut it, as `strategy.tensor_plan` does. With `loss`
        the model returns `loss(output, ...)` where it is called with the keywords that `loss` names.

        Raises: UserError where files do not fit, nothing initialises a tensor on meta, or no plan is known.
        """
        if any(model is known for known in self._models):
            return model
        seed, group = self.config.run.seed, self.backend.group
        take_given(self.backend, model, plan, loss)
        start = Start(model, group, device=self.device, seed=seed, init=init, weights=weights, strict=strict)
        apply_recomputation(model, self.config.activation_checkpointing, cutting_group(self.backend))
        self.backend.start = start
        if not self.backend.brings_models:
            start.place_all()
        prepared = self.backend.prepare_model(model)
        self._watching += self.clock.watch(prepared)
        self._models.append(prepared)
        route_clipping(self)
        watch_steps(self)
        say_started(self, self.config.precision.dtype)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """Make `optimizer` step this rank's shards. Collective."""
        if isinstance(optimizer, PreparedOptimizer):
            return optimizer
        prepared = self.backend.prepare_optimizer(optimizer)
        prepared.step_allowed = functools.partial(step_allowed, self)
        prepared.zeroing_allowed = functools.partial(zeroing_allowed, self)
        prepared.before_step = self._before_step
        prepared.after_step = self._after_step
        self._notice_forgetting(prepared)
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
            pieces=self.num_micro,
            seed=self.config.run.seed,
            on_wait=self.clock.data_wait,
            device=self.device,
        )
        prepared.on_batch, prepared.watch = self.clock.batch, self.step_end
        note_loader(self, prepared, self._num_epochs)
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
            did_step=lambda: not self.optimizer_step_was_skipped and not self.resuming.is_passing,
            sync_gradients=lambda: self.sync_gradients,
        )
        self._schedulers.append(prepared)
        return prepared

    # ---- a training step -----------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Run one micro-batch; gradients travel and the optimizer steps on the last of a step, or of the loader."""
        self.step_end.working()
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
        """Keep gradients of the passes inside local (stages 2 and 3 reduce into shards); to step there is an error."""
        with without_sync(self):
            yield

    def _set_sync(self, sync: bool) -> None:
        self.sync_gradients = sync
        self.backend.set_sync(sync)

    def backward(self, loss: torch.Tensor, *, micro_batches: int | None = None, **kwargs: Any) -> None:
        """Compute gradients, averaged over ranks and micro-batches. Collective: all ranks.

        `loss` is the mean over this rank's micro-batch; kwargs go to `loss.backward`. It is divided by `micro_batches`,
        without which it is `gradient_accumulation_steps`.
        """
        if self._half:
            self._refuse_half_loaded()
        if self._stepped:
            self._finish_step()
        self.step_end.working()
        self.step_end.used()
        self._unstepped = True
        begin = time.perf_counter()
        self.telemetry.phase("backward")
        self.backend.before_backward()
        factor = self.loss_factor(micro_batches)
        with self.clock.flops.backward(bool(kwargs.get("create_graph"))):
            self.backend.backward(loss, factor, **kwargs)
        self.backend.end_backward()
        self.clock.backward(begin, loss)
        self.telemetry.phase("idle")

    def loss_factor(self, micro_batches: int | None = None) -> float:
        """Return what `backward` multiplies a loss by."""
        factor = 1.0 / (micro_batches or self.gradient_accumulation_steps)
        return factor if self.scaler is None else factor * self.scaler.scale

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor | None:
        """Clip gradients by their global norm and return the norm before; None while gradients accumulate.

        Collective: all ranks.
        """
        if not step_allowed(self, "clip_grad_norm_"):
            return None
        begin = time.perf_counter()
        self._unscale()
        params = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        norm = self.backend.clip_grad_norm_(params, max_norm, float(norm_type))
        self._norm_of_step = norm
        self.clock.grad_norm = streams.reader(norm)
        self.clock.optimizer_s += time.perf_counter() - begin
        return norm

    def clip_grad_value_(self, parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
        """Clamp every gradient element to [-clip_value, clip_value]. Collective: all ranks."""
        if step_allowed(self, "clip_grad_value_"):
            self._unscale()
            params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            for optimizer in self._optimizers:
                place = optimizer.place_of(params)
                if place is None or place:
                    optimizer.clamp_gradients(clip_value, place)

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Give the whole gradients of `model` by parameter name, as the next step uses them; changes are kept.

        Averaged over ranks and micro-batches, without the loss scale. What is replaced in the dict or changed in place
        is what the optimizer steps with; all ranks must do the same. Parameters without a gradient are left out.
        Collective: all ranks, after backward and before step. Under fsdp2 they are DTensors.
        """
        if self.sync_gradients:
            self._unscale()
        with self.backend.gradients(model) as found:
            yield found

    def _unscale(self) -> None:
        if self.scaler is None:
            return
        for optimizer in self._optimizers:
            unscale(optimizer, self.scaler.scale)

    def _before_step(self, optimizer: PreparedOptimizer) -> None:
        if not self._stepped:
            self.step_end.working()
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
            optimizer.skip_next = not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())

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
        self._unstepped = False
        group, telemetry = self.backend.group or self.data_group, self.telemetry
        self.expert_load.after_step(self._models, stepped, group, telemetry, self.clock.step, skipped)
        self.step_end.stepped()
        self._ask_saves()
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

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared; returns a None for each object, to rebind the names. Collective.

        The models get their own hooks and forwards back; at stage 3, where a rank has a part of each, they are empty.
        """
        self.step_end.finish()
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        self.backend.free()
        for model in self._models:  # what stood for their forwards first goes last
            remove_activation_checkpointing(model)
        for held in (self._models, self._optimizers, self._schedulers, self._loaders):
            held.clear()
        self.backend = backend_of(self, self.backend.group, self.backend.axes)
        return [None for _ in objects]

    def forget_step(self) -> None:
        """Drop what is left of a step that began before a state was loaded."""
        super().forget_step()
        self._micro_step, self._stepped, self._norm_of_step = 0, [], None
