"""Puts distui's engine and telemetry under transformers' `Trainer`, once that has been imported."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distui.compat.accelerate.beside import OWN_ENV
from distui.compat.accelerate.data_loader import skip_first_batches
from distui.compat.accelerate.optimizer import AcceleratedOptimizer
from distui.compat.transformers import arguments
from distui.compat.transformers.accelerator import TrainerAccelerator
from distui.compat.transformers.callback import make_callback
from distui.core.config.batch import solve_batch
from distui.core.engine.job import job_config
from distui.core.errors import UserError

STATES = "distui"
"""The folder in a Trainer checkpoint that holds optimizer states and fp32 masters, as distui's own checkpoint."""


def install_arguments(module: ModuleType) -> None:
    """Have `transformers.training_args` leave `deepspeed=` to distui's engine."""
    if os.environ.get(OWN_ENV) != "accelerate":
        kind: Any = module.TrainingArguments
        kind.__post_init__ = _wrapped(kind.__post_init__, arguments.take_deepspeed)


def install_trainer(module: ModuleType) -> None:
    """Rebind what `transformers.trainer` takes from Accelerate, and add the callback."""
    if not hasattr(module, "Accelerator"):
        return  # Accelerate is not installed: Trainer itself says so
    module.DEFAULT_CALLBACKS.append(make_callback(module))
    if os.environ.get(OWN_ENV) == "accelerate":
        return
    module.Accelerator = TrainerAccelerator  # type: ignore[attr-defined]
    module.skip_first_batches = skip_first_batches  # type: ignore[attr-defined]
    trainer: Any = module.Trainer
    for name, around in _AROUND.items():
        if hasattr(trainer, name):  # not every release of transformers has all of them
            setattr(trainer, name, _wrapped(getattr(trainer, name), around))


def _wrapped(own: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(own, self, *args, **kwargs)

    return method


# ---- around Trainer's methods: each gets the method itself first ---------------------------------------------------


def _create(own: Any, trainer: Any) -> None:
    configure(trainer.args)
    trainer.args.deepspeed_plugin = arguments.plugin_of(trainer.args)
    own(trainer)
    trainer.accelerator.engine.config.checkpoint.every_steps = 0  # `configure` had Trainer do it
    trainer.accelerator.engine.resuming.is_due = False  # it counts steps by itself: `resume_from_checkpoint` is its way


def configure(args: Any) -> None:
    """Give TrainingArguments what distui's configuration sets; what it leaves at its default stays the script's."""
    config = job_config({})
    batch = config.batch
    if batch.global_size is not None or batch.micro_size is not None or batch.accumulation is not None:
        if batch.global_size is not None and batch.micro_size is None and batch.accumulation is None:
            batch = batch.model_copy(update={"micro_size": args.per_device_train_batch_size})
        plan = solve_batch(batch, arguments.num_data_ranks(args))
        if plan.micro_size is not None:
            args.per_device_train_batch_size = plan.micro_size
        if plan.accumulation is not None and (batch.accumulation or batch.global_size):
            args.gradient_accumulation_steps = plan.accumulation
    if config.optimizer.max_grad_norm:
        args.max_grad_norm = config.optimizer.max_grad_norm
    if config.checkpoint.every_steps:
        args.save_strategy = type(args.save_strategy)("steps")
        args.save_steps, args.save_total_limit = config.checkpoint.every_steps, config.checkpoint.keep


def _prepare(own: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(trainer.optimizer, AcceleratedOptimizer):
        # train() once more: the engine was freed, and with it the shards that the optimizer stepped.
        if trainer.optimizer_cls_and_kwargs is None and getattr(trainer, "_distui_given_optimizer", False):
            raise UserError(
                "train() was called again with an optimizer that the script made",
                "it is bound to the shards of the first call, which are gone",
                "make a new Trainer with a new optimizer, or let Trainer make it",
            )
        trainer.optimizer = None
    else:
        trainer._distui_given_optimizer = trainer.optimizer is not None
    return own(trainer, *args, **kwargs)


def _move(own: Any, trainer: Any, model: Any, device: Any) -> Any:
    """Leave a model that the engine will shard where it is: it comes to the device a unit at a time."""
    accelerator = trainer.accelerator
    if model is not getattr(trainer, "model", model) or accelerator.weights_are_local or accelerator.holds(model):
        return own(trainer, model, device)
    return None


def _step(own: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    trainer.accelerator.micro_batches_of_step = getattr(trainer, "current_gradient_accumulation_steps", 1) or 1
    return own(trainer, *args, **kwargs)


def _count_items(own: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Count the labels of a step; Trainer would divide by the ranks that share a batch, which are counted once here."""
    trainer.accelerator.shows_axes = False
    try:
        return own(trainer, *args, **kwargs)
    finally:
        trainer.accelerator.shows_axes = True


def _evaluate(own: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    before, trainer.accelerator.evaluating = trainer.accelerator.evaluating, True
    try:
        return own(trainer, *args, **kwargs)
    finally:
        trainer.accelerator.evaluating = before


def _save(own: Any, trainer: Any, output_dir: Any = None, state_dict: Any = None) -> Any:
    accelerator = trainer.accelerator
    if state_dict is None and accelerator.holds(trainer.model):
        local = accelerator.weights_are_local
        if trainer.args.should_save or not local:
            state_dict = accelerator.weights(trainer.model)
    return own(trainer, output_dir, state_dict)


def _save_states(own: Any, trainer: Any, output_dir: str) -> None:
    trainer.accelerator.engine.save_state(str(Path(output_dir) / STATES))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")


def _load_states(own: Any, trainer: Any, checkpoint: str | None) -> None:
    if checkpoint is None:
        return
    folder = Path(checkpoint) / STATES
    if not folder.is_dir():
        if (Path(checkpoint) / "optimizer.pt").exists():
            raise UserError(
                f"{checkpoint} was saved by Trainer without distui",
                "its optimizer.pt is laid out for whole parameters; the weights alone can be loaded",
                f"remove {checkpoint}/optimizer.pt to go on from the weights with a fresh optimizer",
            )
        return
    trainer.accelerator.engine.load_state(str(folder))
    scheduler = Path(checkpoint) / "scheduler.pt"
    if scheduler.exists():
        trainer.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))


def _load_best(own: Any, trainer: Any) -> Any:
    with _whole(trainer):
        return own(trainer)


@contextmanager
def _whole(trainer: Any) -> Iterator[None]:
    accelerator = trainer.accelerator
    if not accelerator.holds(trainer.model) or accelerator.weights_are_local:
        yield
        return
    with accelerator.engine.full_parameters(trainer.model, writeback=True):
        yield


def _scaler_is_in_states(own: Any, trainer: Any, folder: str | None) -> None:
    """Do nothing: distui's checkpoint holds the loss scale."""


def _has_mixed_grads(own: Any, trainer: Any, model: Any) -> bool:
    """Answer without looking at gradients: none of ours is a DTensor, and no rank has the whole of one to show."""
    return False


_AROUND: dict[str, Callable[..., Any]] = {
    "create_optimizer": arguments.create_optimizer,
    "create_scheduler": arguments.create_scheduler,
    "_has_mixed_mesh_grads": _has_mixed_grads,
    "create_accelerator_and_postprocess": _create,
    "_prepare_for_training": _prepare,
    "_move_model_to_device": _move,
    "training_step": _step,
    "_get_num_items_in_batch": _count_items,
    "evaluate": _evaluate,
    "predict": _evaluate,
    "_save": _save,
    "_save_optimizer_and_scheduler": _save_states,
    "_load_optimizer_and_scheduler": _load_states,
    "_load_best_model": _load_best,
    "_save_scaler": _scaler_is_in_states,
    "_load_scaler": _scaler_is_in_states,
}
