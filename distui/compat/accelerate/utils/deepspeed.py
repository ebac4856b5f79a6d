"""What scripts use of `accelerate.utils.deepspeed`: a JSON to ask, and dummies for its optimizer and schedule."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from distui.compat.accelerate.optimizer import AcceleratedOptimizer
from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.scheduler import AcceleratedScheduler
from distui.compat.accelerate.state import AcceleratorState, GradientState
from distui.compat.deepspeed.lr_schedules import build_schedule
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.compat.whole import gathered


class HfDeepSpeedConfig:
    """A DeepSpeed JSON that can be asked for values at dotted paths."""

    def __init__(self, config_file_or_dict: Any) -> None:
        """Take a dict, a file, or JSON as text or in base64. Raises ValueError for another."""
        given = config_file_or_dict
        if isinstance(given, dict):
            self.config: dict[str, Any] = copy.deepcopy(given)
        elif os.path.exists(given):
            with open(given, encoding="utf-8") as file:
                self.config = json.load(file)
        else:
            try:
                text = given if str(given).lstrip().startswith("{") else base64.urlsafe_b64decode(given).decode("utf-8")
                self.config = json.loads(text)
            except (UnicodeDecodeError, AttributeError, ValueError) as error:
                raise ValueError(
                    "Expected a string path to an existing deepspeed config, or a dictionary, or a base64 encoded "
                    f"string. Received: {given}"
                ) from error
        self._stage = self.get_value("zero_optimization.stage", -1)
        homes = {self.get_value(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")}
        self._offload = self._stage in (2, 3) and bool(homes & {"cpu", "nvme"})

    def find_config_node(self, ds_key_long: str) -> tuple[Any, str]:
        """Return the table that holds a key, None where there is none, and the key's own name."""
        *sections, last = ds_key_long.split(".")
        table: Any = self.config
        for section in sections:
            table = table.get(section)
            if table is None:
                break
        return table, last

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Return the value at a dotted path."""
        table, last = self.find_config_node(ds_key_long)
        return default if table is None else table.get(last, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Take out a key. Raises ValueError where it must exist and does not."""
        table, last = self.find_config_node(ds_key_long)
        if table is not None and last in table:
            del table[last]
        elif must_exist:
            raise ValueError(f"Can't find {ds_key_long} entry in the config: {self.config}")

    def is_true(self, ds_key_long: str) -> bool:
        """Return whether a key is set, and true."""
        value = self.get_value(ds_key_long)
        return value is not None and bool(value)

    def is_false(self, ds_key_long: str) -> bool:
        """Return whether a key is set, and false."""
        value = self.get_value(ds_key_long)
        return value is not None and not bool(value)

    def is_zero2(self) -> bool:
        """Return whether the stage is 2."""
        return bool(self._stage == 2)

    def is_zero3(self) -> bool:
        """Return whether the stage is 3."""
        return bool(self._stage == 3)

    def is_offload(self) -> bool:
        """Return whether anything is offloaded."""
        return self._offload


def get_active_deepspeed_plugin(state: Any) -> Any:
    """Return the DeepSpeedPlugin that the script gave. Raises ValueError where it gave none."""
    if state.deepspeed_plugin is None:
        raise ValueError("Couldn't retrieve the active `DeepSpeedPlugin` as none were enabled.")
    return state.deepspeed_plugin


class GatheredParameters(AbstractContextManager[None]):
    """A context with whole parameters; what rank `modifier_rank` writes to them is kept on all ranks. Collective."""

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        self._params = [params] if isinstance(params, torch.Tensor) else list(params)
        self._modifier_rank, self._enabled = modifier_rank, enabled
        self._stack = ExitStack()

    def __enter__(self) -> None:
        wanted = {id(param) for param in self._params}
        for accelerator in list(GradientState._listeners) if self._enabled else ():
            for model in accelerator.engine._models:
                if any(id(param) in wanted for param in nn.Module.parameters(model)):
                    self._stack.enter_context(gathered(accelerator.engine, model, self._params, self._modifier_rank))
                    return

    def __exit__(self, *args: Any) -> None:
        self._stack.__exit__(*args)


# ---- the JSON's optimizer and schedule -----------------------------------------------------------------------------


class DummyOptim:
    """Stands for the optimizer that the DeepSpeedPlugin's JSON names, until `prepare` makes it."""

    def __init__(self, params: Iterable[Any], lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params, self.lr, self.weight_decay, self.kwargs = params, lr, weight_decay, kwargs


class DummyScheduler:
    """Stands for the schedule that the JSON names, or that `lr_scheduler_callable` makes, until `prepare` makes it."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Any = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer, self.total_num_steps, self.warmup_num_steps = optimizer, total_num_steps, warmup_num_steps
        self.lr_scheduler_callable, self.kwargs = lr_scheduler_callable, kwargs


class EngineSteppedScheduler(AcceleratedScheduler):
    """A schedule that moves on by one with each step of its optimizer, as DeepSpeed's engine has it."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the optimizer's step did."""


def _json() -> dict[str, Any]:
    plugin = AcceleratorState().deepspeed_plugin
    return dict(plugin.deepspeed_config) if plugin is not None else {}


def check_given(objects: Iterable[Any]) -> None:
    """Refuse what Accelerate refuses of optimizers and schedules in the JSON and in the script.

    Raises: ValueError where both, or neither, name one.
    """
    config, objects = _json(), list(objects)
    has_optimizer = any(isinstance(value, (DummyOptim, torch.optim.Optimizer)) for value in objects)
    if has_optimizer and "scheduler" in config and not any(isinstance(value, DummyScheduler) for value in objects):
        raise ValueError(
            "The config file names a scheduler, which steps with the optimizer: pass "
            "`accelerate.utils.DummyScheduler(optimizer)` to prepare(), or take it out of the config file."
        )
    for value in objects:
        if isinstance(value, torch.optim.Optimizer) and "optimizer" in config:
            raise ValueError(
                "You cannot specify an optimizer in the config file and in the code at the same time. Please remove "
                "the optimizer from the config file or create `accelerate.utils.DummyOptim` in the code."
            )
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler) and "scheduler" in config:
            raise ValueError(
                "You cannot specify a scheduler in the config file and in the code at the same time. Please remove "
                "the scheduler from the config file or create `accelerate.utils.DummyScheduler` in the code."
            )
        if isinstance(value, DummyOptim) and "optimizer" not in config:
            raise ValueError("You cannot create a `DummyOptim` without specifying an optimizer in the config file.")


def optimizer_of(dummy: DummyOptim) -> torch.optim.Optimizer:
    """Return the JSON's optimizer on the dummy's parameters; "auto" is what the dummy says."""
    section = copy.deepcopy(_json()["optimizer"])
    params = section.setdefault("params", {})
    for name, value in (("lr", dummy.lr), ("weight_decay", dummy.weight_decay)):
        if params.get(name) == "auto":
            params[name] = value
    built = build_optimizer(section, dummy.params)
    if built is None:
        raise ValueError("the JSON's optimizer has no type")
    return built


def schedule_of(dummy: DummyScheduler, optimizer: Any, split_batches: bool) -> Any:
    """Return the JSON's schedule, or what the dummy's callable makes, on a prepared optimizer.

    Raises: ValueError where there is neither.
    """
    if dummy.lr_scheduler_callable is not None:
        return dummy.lr_scheduler_callable(optimizer)
    section = copy.deepcopy(_json().get("scheduler"))
    if section is None:
        raise ValueError(
            "Either specify a scheduler in the config file or pass in the `lr_scheduler_callable` parameter when using "
            "`accelerate.utils.DummyScheduler`."
        )
    lr = getattr(dummy.optimizer, "lr", None)
    total, ranks = dummy.total_num_steps, AcceleratorState().num_processes
    told = {
        "warmup_min_lr": 0,
        "warmup_max_lr": lr if lr is not None else dummy.optimizer.defaults["lr"],
        "warmup_num_steps": max(1, dummy.warmup_num_steps),
        "total_num_steps": total if total is None or split_batches else math.ceil(total / ranks),
    }
    params = section.setdefault("params", {})
    section["params"] = {key: told.get(key, value) if value == "auto" else value for key, value in params.items()}
    return build_schedule(section, optimizer)


class DeepSpeedEngineWrapper:
    """One call that does backward and step, around an engine of the face of DeepSpeed."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Compute gradients, and step where they are synchronised. Collective."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.engine.step()

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last step's gradients as a number."""
        norm = self.engine.get_global_grad_norm()
        return norm.item() if hasattr(norm, "item") else norm


class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
    """The optimizer of such an engine, which `DeepSpeedEngineWrapper.backward` steps."""

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Nothing: the backward did it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the backward did it."""

    step.hooked = True  # type: ignore[attr-defined]


class DeepSpeedSchedulerWrapper(AcceleratedScheduler):
    """The schedule of such an engine, likewise."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the backward did it."""


def map_pytorch_optim_to_deepspeed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer itself: the engine steps torch's own on offloaded states."""
    return optimizer


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.deepspeed", {}, name)
