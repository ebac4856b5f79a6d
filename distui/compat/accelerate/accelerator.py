"""Accelerate's `Accelerator` on distui's engine: its names, defaults and semantics, and the strategy of the job."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from distui.compat.accelerate.arguments import plugins_of, settle, sort_handlers
from distui.compat.accelerate.data.loaders import PreparedDataLoader
from distui.compat.accelerate.data_loader import prepare_data_loader, skip_first_batches
from distui.compat.accelerate.logging import get_logger
from distui.compat.accelerate.optimizer import AcceleratedOptimizer
from distui.compat.accelerate.ranks import join_axes
from distui.compat.accelerate.refusals import NotOffered
from distui.compat.accelerate.saving import Saving, _Kept
from distui.compat.accelerate.scheduler import AcceleratedScheduler
from distui.compat.accelerate.state import AcceleratorState, GradientState
from distui.compat.accelerate.steps import ModelNoSync, NoteSync, Steps
from distui.compat.accelerate.tracking import filter_trackers
from distui.compat.accelerate.utils.axes import ParallelismConfig
from distui.compat.accelerate.utils.dataclasses import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from distui.compat.accelerate.utils.deepspeed import (
    DummyOptim,
    DummyScheduler,
    EngineSteppedScheduler,
    check_given,
    optimizer_of,
    schedule_of,
)
from distui.compat.accelerate.utils.other import compile_regions, extract_model_from_parallel
from distui.core.backends.ddp import DDPBackend
from distui.core.engine.batches import tell_changed_batch
from distui.core.engine.engine import Engine
from distui.core.engine.job import job_config
from distui.core.ranks.precision import cast_floating

__all__ = ["Accelerator", "DataLoaderConfiguration", "GradientAccumulationPlugin"]

logger = get_logger("accelerate.accelerator")


def _casting_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a model's own forward under autocast, and give fp32; bound to the model, so that copies cast too."""
    own = self.__dict__.get("_forward_before_autocast")
    forward = own if own is not None else types.MethodType(type(self).forward, self)
    device, dtype, options = self.__dict__["_autocast"]
    with torch.autocast(device, dtype=dtype, **options):
        output = forward(*args, **kwargs)
    return cast_floating(output, torch.float32)


def _rebuild(options: dict[str, Any], loaders: list[Any]) -> Accelerator:
    accelerator = Accelerator(**options)
    accelerator._dataloaders += loaders
    return accelerator


class Accelerator(Steps, Saving):
    """Accelerate's entry point; `engine` is the `distui.Engine` under it."""

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool | None = None,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: list[Any] | None = None,
        log_with: Any = None,
        project_dir: Any = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Any] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
    ) -> None:
        """Join the job. Collective. Arguments are Accelerate's; what has no counterpart raises `NotOffered`."""
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self._given = {key: value for key, value in given.items() if value is not None}
        Steps.__init__(self)
        Saving.__init__(self)
        self.project_configuration = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and self.project_dir is None:
            self.project_configuration.set_directories(project_dir)
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        if split_batches is not None:
            self.dataloader_config.split_batches = split_batches
        if gradient_accumulation_plugin is not None and gradient_accumulation_steps != 1:
            raise ValueError(
                "You can only pass one of `gradient_accumulation_steps` and `gradient_accumulation_plugin`."
            )
        if dynamo_backend is not None and dynamo_plugin is not None:
            raise ValueError("You cannot pass in both `dynamo_plugin` and `dynamo_backend`, please only pass in one.")
        if deepspeed_plugin is not None and deepspeed_plugins is not None:
            raise ValueError("You cannot pass in both `deepspeed_plugins` and `deepspeed_plugin`.")
        deepspeed_plugin = deepspeed_plugin if deepspeed_plugin is not None else deepspeed_plugins
        accumulation = gradient_accumulation_plugin or GradientAccumulationPlugin(num_steps=gradient_accumulation_steps)
        self.handlers = sort_handlers(kwargs_handlers)
        plugins = plugins_of(deepspeed_plugin, fsdp_plugin, megatron_lm_plugin, torch_tp_plugin, parallelism_config)
        parallelism_config = next((plugin for plugin in plugins if isinstance(plugin, ParallelismConfig)), None)
        settled = settle(job_config({}), mixed_precision, accumulation, self.handlers, plugins)
        init = self.handlers.init.to_dict() if self.handlers.init is not None else {}
        self.state = AcceleratorState(
            mixed_precision=settled.mixed_precision,
            cpu=cpu,
            dynamo_plugin=dynamo_plugin or TorchDynamoPlugin(backend=dynamo_backend),
            deepspeed_plugin=deepspeed_plugin,
            fsdp_plugin=fsdp_plugin,
            parallelism_config=parallelism_config,
            _from_accelerator=True,
            **init,
        )
        sections: dict[str, Any] = settled.sections
        self.engine = Engine(**sections)
        join_axes(self.engine, self.state, parallelism_config)
        if isinstance(self.engine.backend, DDPBackend) and self.handlers.ddp is not None:
            self.engine.backend.comm_hook = self.handlers.ddp.hook()
        self._autocast_dtype = settled.autocast_dtype
        self.gradient_state = GradientState(settled.accumulation)
        self._sync_each_batch = settled.accumulation.sync_each_batch
        self.gradient_state._set_sync_gradients(True)
        GradientState._listeners.add(self)
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.rng_types = rng_types if rng_types is not None else ["generator"]
        self.log_with = filter_trackers(log_with, self.logging_dir)
        self.step = 0
        self.engine._faces["accelerate"] = _Kept(self)
        self.flag_tensor = None
        self.fp8_enabled = False
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[PreparedDataLoader] = []

    def __reduce__(self) -> Any:
        return _rebuild, (self._given, self._dataloaders)

    # ---- prepare ----------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Make models, optimizers, loaders and schedulers work on all ranks; same order back. Collective."""
        if self.distributed_type is None:  # raises where the state was reset
            raise RuntimeError("the state was reset")
        kinds: list[tuple[Any, Callable[[Any], Any]]] = [
            (nn.Module, self.prepare_model),
            (torch.optim.Optimizer, self.prepare_optimizer),
            (DataLoader, self.prepare_data_loader),
            (torch.optim.lr_scheduler.LRScheduler, self.prepare_scheduler),
        ]
        check_given(args)
        args = tuple(optimizer_of(value) if isinstance(value, DummyOptim) else value for value in args)
        kinds.append((DummyScheduler, self.prepare_scheduler))
        prepared: dict[int, Any] = {}
        for kind, prepare in kinds:
            for index, value in enumerate(args):
                if isinstance(value, kind):
                    prepared[index] = prepare(value)
        if (axes := self.parallelism_config) is not None and axes.sp_enabled and self._models:
            for value in prepared.values():
                if isinstance(value, PreparedDataLoader):
                    value.shifts_labels = True
        self.engine._report_memory()
        results = tuple(prepared.get(index, value) for index, value in enumerate(args))
        return results[0] if len(results) == 1 else results

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Move `model` to the device and shard it; it is not wrapped. Collective."""
        if any(model is known for known in self._models):
            return model
        device_map: Any = getattr(model, "hf_device_map", None) or {}
        if len(set(device_map.values())) > 1:
            raise NotOffered(
                "a model spread with device_map='auto' cannot be trained on several ranks",
                f"its layers lie on {len(set(device_map.values()))} devices",
                "load it without device_map and shard it: strategy.zero_stage=3",
            )
        prepared = self.engine.prepare_model(model)
        if self._autocast_dtype is not None:
            self._cast_forward(prepared)
        prepared.register_forward_pre_hook(NoteSync(self))
        if not hasattr(prepared, "no_sync"):
            prepared.__dict__["no_sync"] = ModelNoSync(self)
        prepared.__dict__["_is_accelerate_prepared"] = True  # some libraries ask
        self._models.append(prepared)
        plugin = self.state.dynamo_plugin
        if str(plugin.backend) != "NO" and not plugin.disable:
            (compile_regions if plugin.use_regional_compilation else nn.Module.compile)(prepared, **plugin.to_kwargs())
        return prepared

    def _cast_forward(self, model: nn.Module) -> None:
        options: dict[str, Any] = {}
        if self.handlers.autocast is not None:
            options = {key: value for key, value in self.handlers.autocast.to_dict().items() if value is not None}
        if "forward" in model.__dict__:
            model.__dict__["_forward_before_autocast"] = model.forward
        model.__dict__["_autocast"] = (self.device.type, torch.bfloat16, options)
        model.forward = types.MethodType(_casting_forward, model)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Make `optimizer` step this rank's shards. Collective."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        prepared = AcceleratedOptimizer(self.engine.prepare_optimizer(optimizer), scaler=self.engine.scaler)
        self._optimizers.append(prepared)
        return prepared

    def prepare_data_loader(
        self,
        data_loader: Any,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Divide a loader's batches among the ranks."""
        if isinstance(data_loader, PreparedDataLoader):
            if not any(data_loader is known for known in self._dataloaders):
                self._keep(data_loader)
            return data_loader
        config = self.dataloader_config
        prepared = prepare_data_loader(
            self._with_micro_size(data_loader),
            self.device,
            num_processes=self.engine.num_data_ranks,
            process_index=self.engine.data_index,
            split_batches=config.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=list(self.rng_types),
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
        )
        self._keep(prepared)
        return prepared

    def _with_micro_size(self, loader: Any) -> Any:
        """Give a loader the micro-batches that the job's configuration asks for, where it asks."""
        micro, pieces, ranks = self.engine._micro_size, self.engine.num_micro, self.engine.num_data_ranks
        if type(loader.batch_sampler) is not BatchSampler:
            return loader
        own = loader.batch_size // ranks if self.split_batches else loader.batch_size
        micro = micro or own * pieces  # a pipeline takes the micro-batches of a step at once
        if own == micro:
            return loader
        tell_changed_batch(self.engine, own * pieces, micro)
        size = micro * ranks if self.split_batches else micro
        loader.__dict__["batch_sampler"] = BatchSampler(loader.sampler, size, loader.drop_last)
        loader.__dict__["batch_size"] = size
        return loader

    def _keep(self, loader: PreparedDataLoader) -> None:
        loader.on_wait, loader.on_batch = self.engine.clock.data_wait, self.engine.clock.batch
        loader.watch = self.engine.step_end
        self._dataloaders.append(loader)
        loaders: list[Any] = self.engine._loaders  # saved with the rest of the state
        loaders.append(loader)

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Make `scheduler` step when its optimizer does."""
        if isinstance(scheduler, AcceleratedScheduler):
            return scheduler
        if isinstance(scheduler, DummyScheduler):
            optimizer = self._optimizers[-1]
            made = schedule_of(scheduler, optimizer, self.split_batches)
            optimizer.after_step = made.step
            return self._keep_scheduler(EngineSteppedScheduler(made, [optimizer]))
        own = getattr(scheduler, "optimizer", None)
        inner = getattr(own, "optimizer", own)
        bound = [o for o in self._optimizers if own in (o, o.optimizer) or getattr(o.optimizer, "inner", None) is inner]
        prepared = AcceleratedScheduler(
            scheduler,
            bound or self._optimizers,
            step_with_optimizer=self.step_scheduler_with_optimizer,
            split_batches=self.split_batches,
        )
        return self._keep_scheduler(prepared)

    def _keep_scheduler(self, prepared: AcceleratedScheduler) -> AcceleratedScheduler:
        self._schedulers.append(prepared)
        self.engine._schedulers.append(prepared)  # type: ignore[arg-type]
        return prepared

    def deepspeed_ulysses_dl_adapter(self, dl: Any, model: Any) -> Any:
        """Have a prepared loader give `shift_labels`, where sequences are shared; the model itself cuts the batch."""
        if (axes := self.parallelism_config) is not None and axes.sp_enabled:
            dl.shifts_labels = True
        return dl

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Return a view of a loader without its first batches."""
        return skip_first_batches(dataloader, num_batches)

    # ---- afterwards -------------------------------------------------------------------------------------------

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step was skipped by an overflow."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """Return the model as it was given: preparing does not wrap it."""
        for schedule in self._schedules():
            schedule.finish_gathers()  # stages 1 and 2: who unwraps a model reads its weights
        model = extract_model_from_parallel(self.engine.unwrap_model(model), keep_torch_compile=keep_torch_compile)
        if not keep_fp32_wrapper and "_autocast" in model.__dict__:
            del model.__dict__["_autocast"], model.__dict__["forward"]
            if own := model.__dict__.pop("_forward_before_autocast", None):
                model.forward = own
        return model

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared; a None for each object, to rebind the names."""
        for held in (self._models, self._optimizers, self._schedulers, self._dataloaders):
            held.clear()
        self.step = 0
        return self.engine.free_memory(*objects)

    def clear(self, *objects: Any) -> list[None]:
        """Do what `free_memory` does."""
        return self.free_memory(*objects)

    def verify_device_map(self, model: nn.Module) -> bool:
        """Return whether a part of the model was spread over several devices with a device map."""
        return any(len(getattr(module, "hf_device_map", None) or {}) > 1 for module in model.modules())

    def __getattr__(self, name: str) -> Any:
        refusals = {
            "lomo_backward": "use an optimizer with a step of its own",
            "deepspeed_engine_wrapped": "distui's own engine runs what a DeepSpeedPlugin asks for",
        }
        if hasattr(type(self), name):  # a property that raised AttributeError: its own error is the one to tell
            return object.__getattribute__(self, name)
        if name in refusals:
            raise NotOffered(f"Accelerator.{name} is not offered by distui", "it would do nothing", refusals[name])
        raise AttributeError(f"'Accelerator' object has no attribute {name!r}")
