"""`deepspeed.initialize`: a model, its optimizer, its schedule and its loader from DeepSpeed's JSON."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distui.compat.deepspeed import checkpointing, comm
from distui.compat.deepspeed.configuration import DeepSpeedConfig, settle
from distui.compat.deepspeed.curricula import schedulers
from distui.compat.deepspeed.engine import DeepSpeedEngine
from distui.compat.deepspeed.loading import DeepSpeedDataLoader
from distui.compat.deepspeed.lr_schedules import build_schedule
from distui.compat.deepspeed.moe.layer import expert_parallel_of
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.compat.deepspeed.parameters import tell_of
from distui.compat.deepspeed.precision import OwnOutputs, scaler_of
from distui.compat.deepspeed.runtime.base_optimizer import answers_as_zero
from distui.compat.deepspeed.runtime.pipe.engine import PipelineEngine, loss_of
from distui.compat.deepspeed.runtime.pipe.module import PipelineModule
from distui.compat.deepspeed.runtime.pipe.topology import PipelineParallelGrid
from distui.compat.deepspeed.runtime.sequence_parallel.ulysses_sp import SequenceParallel
from distui.compat.deepspeed.runtime.tensor_parallel.init_utils import axes_of
from distui.compat.deepspeed.utils import groups
from distui.compat.not_offered import NotOffered, refuse_pipeline
from distui.core.engine.engine import Engine
from distui.core.errors import UserError


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add DeepSpeed's arguments to a parser: `--deepspeed` and `--deepspeed_config FILE`."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument(
        "--deepspeed", default=False, action="store_true", help="Enable DeepSpeed (a flag for the script)"
    )
    group.add_argument("--deepspeed_config", default=None, type=str, help="DeepSpeed JSON configuration file")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser


def _config_of(args: Any, config: Any, config_params: Any) -> Any:
    given = [value for value in (config, config_params) if value is not None]
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(args, name, None) is not None:
            given.append(getattr(args, name))
    if len(given) == 1 or (len(given) == 2 and config is not None and config_params is not None):
        return given[0]
    if given:
        raise UserError(
            "two DeepSpeed configurations were given",
            f"one in the arguments (--deepspeed_config {given[-1]}) and one to deepspeed.initialize",
            "give one of them",
        )
    raise UserError(
        "deepspeed.initialize got no configuration",
        "neither config= nor --deepspeed_config names one",
        'pass config="ds_config.json", or start the script with --deepspeed_config ds_config.json',
    )


def recomputes(model: PipelineModule, settings: DeepSpeedConfig) -> bool:
    """Return whether the layers of a row are to be recomputed, by the JSON or by the model itself."""
    interval = int(settings.get("pipeline.activation_checkpoint_interval", 0) or model.activation_checkpoint_interval)
    model.activation_checkpoint_interval = interval
    return interval > 0


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, DeepSpeedDataLoader | None, Any]:
    """Return (engine, optimizer, loader, schedule), as DeepSpeed does. Collective: all ranks.

    What is given wins over what the JSON describes. See `configuration.settle` for what the JSON may say.

    Raises: ConfigError with every problem of the JSON; NotOffered for what distui does not do.
    """
    if model is None:
        raise AssertionError("deepspeed.initialize requires a model")
    is_row = isinstance(model, PipelineModule)
    known = isinstance(mpu, (PipelineParallelGrid, SequenceParallel))
    if (mpu is not None and not known) or mesh_param is not None:
        raise NotOffered(
            f"deepspeed.initialize({'mpu' if mpu is not None else 'mesh_param'}=...) is not offered by distui",
            "the engine makes the groups of all axes itself",
            'leave it out: say sizes in the JSON ("tensor_parallel": {"autotp_size": N}), or in strategy.*',
        )
    comm.init_distributed(dist_init_required=dist_init_required, distributed_port=distributed_port)
    axes = axes_of(model) | expert_parallel_of(model)
    if isinstance(model, PipelineModule):
        axes["pipeline"] = model.num_stages
    if isinstance(mpu, SequenceParallel):
        axes["context"] = mpu.size
    settings = settle(_config_of(args, config, config_params), comm.get_world_size(), **axes)
    schedulers(settings, is_row)  # what is wrong is told before anything starts
    sections: dict[str, Any] = settings.sections
    if isinstance(model, PipelineModule) and recomputes(model, settings):
        sections.setdefault("activation_checkpointing", {})["mode"] = "full"
    engine = Engine(**sections)
    if not is_row:
        refuse_pipeline(engine.config.strategy, "DeepSpeed's names")
    groups.follow(engine)
    engine.scaler = scaler_of(settings)
    if settings.get("disable_python_gc", False):
        gc.disable()
    if "activation_checkpointing" in settings.raw:
        checkpointing.configure(deepspeed_config=settings.raw)
    if model_parameters is None:
        model_parameters = [param for param in model.parameters() if param.requires_grad]
    elif not isinstance(model_parameters, (list, tuple)):
        model_parameters = list(model_parameters)
    if optimizer is None:
        if str(settings.section("optimizer").get("type")).lower() == "muon":
            from distui.compat.deepspeed.optim.muon import set_use_muon

            set_use_muon(model)
        in_host = engine.config.offload.optimizer != "none"
        optimizer = build_optimizer(settings.section("optimizer"), model_parameters, in_host)
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model_parameters)
    if isinstance(optimizer, torch.optim.Optimizer) and getattr(optimizer, "inner", None) is not None:
        raise UserError(
            "the optimizer belongs to another engine", "initialize was called with it before", "build one an engine"
        )
    outputs = OwnOutputs()
    keeps_format = engine.config.precision.dtype != "fp32" and not is_row
    if keeps_format:
        outputs.keep(model)
    prepared_model = engine.prepare_model(model, loss=loss_of(model) if isinstance(model, PipelineModule) else None)
    if keeps_format:
        outputs.restore(prepared_model)
    prepared = engine.prepare_optimizer(optimizer) if optimizer is not None else None
    if prepared is not None:
        if engine.config.strategy.zero_stage:
            answers_as_zero(prepared, engine, prepared_model)
        if lr_scheduler is None:
            lr_scheduler = build_schedule(settings.section("scheduler"), prepared)
        elif not hasattr(lr_scheduler, "step"):
            lr_scheduler = lr_scheduler(prepared)
    engine._report_memory()
    kind = PipelineEngine if is_row else DeepSpeedEngine
    wrapped = kind(settings, engine, prepared_model, prepared, lr_scheduler, collate_fn)
    tell_of(wrapped, prepared_model)
    if training_data is not None and isinstance(wrapped, PipelineEngine):
        wrapped.read_from(training_data)
    elif training_data is not None:
        wrapped.training_dataloader = wrapped.deepspeed_io(training_data)
    return wrapped, prepared, wrapped.training_dataloader, lr_scheduler
