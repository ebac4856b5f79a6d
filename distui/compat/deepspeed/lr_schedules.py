"""DeepSpeed's learning-rate schedules by its formulas (deepspeed/runtime/lr_schedules.py, 0.19)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from distui.compat.deepspeed.utils.logging import logger
from distui.core.config.settings import nearest
from distui.core.errors import ConfigError, Problem

WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"
SECOND_BETA = 0.99
"""What DeepSpeed's OneCycle puts in the place of the optimizer's own second beta where it cycles the first."""


def _per_group(optimizer: Any, value: Any, name: str) -> list[float]:
    count = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"expected {count} value for {name}, one a parameter group, got {len(value)}")
    return list(value)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value


class Schedule:
    """Sets every group's learning rate at each `step`, counting batches from -1 as DeepSpeed does."""

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] = [group["lr"] for group in optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group at the current batch."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that were set last."""
        return self._last_lr

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):  # later groups keep their own
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go on to the next batch, or to the given one."""
        after = self.last_batch_iteration + 1
        self.last_batch_iteration = after if last_batch_iteration is None else last_batch_iteration
        self._set(self.get_lr())

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` takes; DeepSpeed's is the same."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.last_batch_iteration = int(sd["last_batch_iteration"])


class LRRangeTest(Schedule):
    """Raises the rate steadily, to find the largest that trains (Smith, arXiv 1803.09820)."""

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: float | list[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = _per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = _positive("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate, self.staircase = lr_range_test_step_rate, lr_range_test_staircase
        if last_batch_iteration == -1:
            self._set(self.min_lr)

    def get_lr(self) -> list[float]:
        """Return min_lr x (1 + step_rate x intervals)."""
        intervals = (self.last_batch_iteration + 1) / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [rate * (1 + self.step_rate * intervals) for rate in self.min_lr]


class OneCycle(Schedule):
    """One cycle up and down, momentum the other way round, then decay (Smith, arXiv 1803.09820)."""

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: float | list[float],
        cycle_max_lr: float | list[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        first, second = float(cycle_first_step_size), cycle_second_step_size
        self.first_step_size, self.second_step_size = first, first if second is None else float(second)
        if first <= 0:
            raise ValueError(f"cycle_first_step_size must be positive, got {first}")
        if self.second_step_size < 0:
            raise ValueError(f"cycle_second_step_size must be non-negative, got {self.second_step_size}")
        self.total_size = first + self.second_step_size
        self.step_ratio = first / self.total_size
        count = cycle_second_stair_count
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = cycle_first_stair_count if count is None else count
        self.min_lrs = _per_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = _per_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.defaults
        if cycle_momentum and not self.cycle_momentum:
            logger.warning("cycle_momentum has no effect: %s has no betas", type(optimizer).__name__)
        self.min_moms = _per_group(optimizer, cycle_min_mom, "cycle_min_mom")
        self.max_moms = _per_group(optimizer, cycle_max_mom, "cycle_max_mom")
        if last_batch_iteration == -1:
            self._set(self.min_lrs)
            if self.cycle_momentum:
                self._set_momentum(self.min_moms)

    def _set_momentum(self, momenta: list[float]) -> None:
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=False):
            group["betas"] = (momentum, SECOND_BETA)

    def _height(self) -> float:
        """Return how far up the cycle is, from 0 to 1."""
        iteration = self.last_batch_iteration + 1
        inside = iteration % self.total_size
        if inside <= self.first_step_size:
            done, size, stairs = inside, self.first_step_size, self.first_stair_count
        else:
            done, size, stairs = self.total_size - inside, self.second_step_size, self.second_stair_count
        return math.floor(done * stairs / size) / stairs if stairs > 0 else done / size

    def _decays(self, rate: float) -> float:
        """Return the decay after the cycle, 0 where there is none."""
        if not self.decay_step_size:
            return 0.0
        return rate * (self.last_batch_iteration - self.total_size + 1) / self.decay_step_size

    def get_lr(self) -> list[float]:
        """Return the rates of the cycle, or after it of the decay."""
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / (1 + self._decays(self.decay_lr_rate)) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Return the betas of each group; None where they are not cycled."""
        return [(momentum, SECOND_BETA) for momentum in self._momenta()] if self.cycle_momentum else None

    def _momenta(self) -> list[float]:
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        return [high * (1 + self._decays(self.decay_mom_rate)) for high in self.max_moms]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set learning rates and momenta of the next batch."""
        super().step(last_batch_iteration)
        if self.cycle_momentum:
            self._set_momentum(self._momenta())


class _Warmup(Schedule):
    """What the warm-ups share: from 0 to 1 in `warmup_num_steps`, by logarithm or line."""

    def __init__(self, optimizer: Any, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if warmup_type not in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
            logger.warning("warmup_type %r is unknown: it rises by the logarithm, as in DeepSpeed", warmup_type)
            warmup_type = WARMUP_LOG_RATE
        self.warmup_num_steps = max(2, _positive("warmup_num_steps", warmup_num_steps))
        self.warmup_type = warmup_type

    def _warmed(self) -> float | None:
        """Return how warm it is; None after the warm-up."""
        if self.last_batch_iteration >= self.warmup_num_steps:
            return None
        if self.warmup_type == WARMUP_LOG_RATE:
            return math.log(self.last_batch_iteration + 1) / math.log(self.warmup_num_steps)
        return self.last_batch_iteration / self.warmup_num_steps


class WarmupLR(_Warmup):
    """Rises from `warmup_min_lr` to `warmup_max_lr` (absent: the optimizer's own), and stays there."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        own = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = _per_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs = own if warmup_max_lr is None else _per_group(optimizer, warmup_max_lr, "warmup_max_lr")
        if last_batch_iteration == -1:
            self._set(self.get_lr())

    def _gamma(self) -> float:
        warmed = self._warmed()
        return 1.0 if warmed is None else warmed

    def get_lr(self) -> list[float]:
        """Return the rates between the smallest and the largest."""
        if self.last_batch_iteration < 0:
            return self.min_lrs
        gamma = self._gamma()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """Rises as `WarmupLR`, then falls in a line to the smallest rate at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _gamma(self) -> float:
        warmed = self._warmed()
        if warmed is not None:
            return warmed
        left = self.total_num_steps - self.last_batch_iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Rises to the optimizer's own rate, then falls by a cosine to `cos_min_ratio` of it."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps, self.warmup_min_ratio, self.cos_min_ratio = (
            total_num_steps,
            warmup_min_ratio,
            cos_min_ratio,
        )
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        if last_batch_iteration == -1:
            self._set(self.get_lr())

    def get_lr_ratio(self) -> float:
        """Return what the optimizer's own rates are multiplied with."""
        if self.last_batch_iteration < 0:
            return 0.0
        warmed = self._warmed()
        if warmed is not None:
            return self.warmup_min_ratio + warmed * (1.0 - self.warmup_min_ratio)
        done = self.last_batch_iteration - self.warmup_num_steps + 1
        progress = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)

    def get_lr(self) -> list[float]:
        """Return the own rates times the ratio."""
        return [rate * self.get_lr_ratio() for rate in self.org_lrs]


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(SCHEDULES)


def build_schedule(section: Mapping[str, Any], optimizer: Any) -> Any:
    """Return the schedule that the JSON's `scheduler` names, on `optimizer`; None where there is none.

    A name of torch.optim.lr_scheduler is taken too.

    Raises: ConfigError for an unknown name or parameter.
    """
    name = section.get("type")
    if name is None or name == "auto":
        return None
    kind: Any = SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, str(name), None)
    if kind is None:
        near = nearest(str(name), SCHEDULES)
        fix = f"write {near}" if near else f"use {', '.join(SCHEDULES)}, or a class of torch.optim.lr_scheduler"
        raise ConfigError(
            [Problem("scheduler.type", f"{name!r} is no schedule", f"DeepSpeed has {', '.join(SCHEDULES)}", fix)]
        )
    params = {key: value for key, value in (section.get("params") or {}).items() if value != "auto"}
    check_params("scheduler", kind, params)
    if not issubclass(kind, Schedule):
        return kind(getattr(optimizer, "inner", optimizer), **params)
    return kind(optimizer, **params)


def check_params(section: str, kind: Any, params: Mapping[str, Any]) -> None:
    """Refuse parameters of a section that its class does not take, each with the nearest that it does.

    Raises: ConfigError.
    """
    known = [name for name in inspect.signature(kind).parameters if name not in ("model_params", "params", "optimizer")]
    problems = []
    for name in params:
        if name not in known:
            near = nearest(name, known)
            takes = f"{kind.__name__} takes {', '.join(known)}"
            problems.append(
                Problem(f"{section}.params.{name}", "unknown key", takes, f"write {near}" if near else "take it out")
            )
    if problems:
        raise ConfigError(problems)
