"""`deepspeed.runtime.lr_schedules`: the schedules, the names of their parameters, and their command-line flags."""

from __future__ import annotations

import argparse
from typing import Any

from distui.compat.deepspeed.lr_schedules import (
    VALID_LR_SCHEDULES,
    WARMUP_LINEAR_RATE,
    WARMUP_LOG_RATE,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
LR_RANGE_TEST_MIN_LR, LR_RANGE_TEST_STEP_RATE = "lr_range_test_min_lr", "lr_range_test_step_rate"
LR_RANGE_TEST_STEP_SIZE, LR_RANGE_TEST_STAIRCASE = "lr_range_test_step_size", "lr_range_test_staircase"
EDGE_VALUE, MID_VALUE = "edge_value", "mid_value"
CYCLE_FIRST_STEP_SIZE, CYCLE_FIRST_STAIR_COUNT = "cycle_first_step_size", "cycle_first_stair_count"
CYCLE_SECOND_STEP_SIZE, CYCLE_SECOND_STAIR_COUNT = "cycle_second_step_size", "cycle_second_stair_count"
DECAY_STEP_SIZE, DECAY_LR_RATE, DECAY_MOM_RATE = "decay_step_size", "decay_lr_rate", "decay_mom_rate"
CYCLE_MIN_LR, CYCLE_MAX_LR = "cycle_min_lr", "cycle_max_lr"
CYCLE_MOMENTUM, CYCLE_MIN_MOM, CYCLE_MAX_MOM = "cycle_momentum", "cycle_min_mom", "cycle_max_mom"
WARMUP_MIN_LR, WARMUP_MAX_LR = "warmup_min_lr", "warmup_max_lr"
WARMUP_NUM_STEPS, WARMUP_TYPE, TOTAL_NUM_STEPS = "warmup_num_steps", "warmup_type", "total_num_steps"
WARMUP_MIN_RATIO, COS_MIN_RATIO = "warmup_min_ratio", "cos_min_ratio"

_RANGE: dict[str, Any] = {
    LR_RANGE_TEST_MIN_LR: 0.001,
    LR_RANGE_TEST_STEP_RATE: 1.0,
    LR_RANGE_TEST_STEP_SIZE: 1000,
    LR_RANGE_TEST_STAIRCASE: False,
}
_CYCLE: dict[str, Any] = {
    CYCLE_FIRST_STEP_SIZE: 1000,
    CYCLE_FIRST_STAIR_COUNT: int,
    CYCLE_SECOND_STEP_SIZE: int,
    CYCLE_SECOND_STAIR_COUNT: int,
    DECAY_STEP_SIZE: 1000,
    CYCLE_MIN_LR: 0.01,
    CYCLE_MAX_LR: 0.1,
    DECAY_LR_RATE: 0.0,
    CYCLE_MOMENTUM: False,
    CYCLE_MIN_MOM: 0.8,
    CYCLE_MAX_MOM: 0.9,
    DECAY_MOM_RATE: 0.0,
}
_WARMUP: dict[str, Any] = {
    WARMUP_MIN_LR: 0.0,
    WARMUP_MAX_LR: 0.001,
    WARMUP_NUM_STEPS: 1000,
    WARMUP_TYPE: WARMUP_LOG_RATE,
}
_COSINE: dict[str, Any] = {
    WARMUP_NUM_STEPS: 1000,
    WARMUP_TYPE: WARMUP_LOG_RATE,
    WARMUP_MIN_RATIO: 0.01,
    COS_MIN_RATIO: 0.01,
}
"""Flag -> its default, or its type where absent means: as the schedule has it."""


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add DeepSpeed's flags of schedules to a parser, and return it."""
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", type=str, default=None, help="LR schedule for training.")
    for name, default in {**_RANGE, **_CYCLE, **_WARMUP, **_COSINE}.items():
        if default is False:
            group.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, type):
            group.add_argument(f"--{name}", type=default)
        else:
            group.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of schedules on the command line, and the rest of it."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def _override(names: dict[str, Any], args: Any, params: dict[str, Any]) -> None:
    params.update({name: getattr(args, name) for name in names if getattr(args, name, None) is not None})


def override_lr_range_test_params(args: Any, params: dict[str, Any]) -> None:
    """Put the range test's flags into a schedule's parameters."""
    _override(_RANGE, args, params)


def override_1cycle_params(args: Any, params: dict[str, Any]) -> None:
    """Put the cycle's flags into a schedule's parameters."""
    _override(_CYCLE, args, params)


def override_warmupLR_params(args: Any, params: dict[str, Any]) -> None:
    """Put the warm-up's flags into a schedule's parameters."""
    _override(_WARMUP, args, params)


def override_warmupCosineLR_params(args: Any, params: dict[str, Any]) -> None:
    """Put the cosine's flags into a schedule's parameters."""
    _override(_COSINE, args, params)


def override_params(args: Any, params: dict[str, Any]) -> None:
    """Put the flags of all schedules into parameters."""
    _override({**_RANGE, **_CYCLE, **_WARMUP, **_COSINE}, args, params)


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Return the JSON's `scheduler` section as the flags say it, or None and what is wrong."""
    kind = getattr(args, LR_SCHEDULE, None)
    if kind is None:
        return None, f"--{LR_SCHEDULE} not specified on command line"
    if kind not in VALID_LR_SCHEDULES:
        return None, f"{kind} is not supported LR schedule"
    params: dict[str, Any] = {}
    _override({LR_RANGE_TEST: _RANGE, ONE_CYCLE: _CYCLE, WARMUP_COSINE_LR: _COSINE}.get(kind, _WARMUP), args, params)
    return {"type": kind, "params": params}, None


def get_lr_from_config(config: dict[str, Any]) -> tuple[float | None, str]:
    """Return the learning rate that a `scheduler` section names, or None and why there is none."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    kind = config["type"]
    if kind not in VALID_LR_SCHEDULES:
        return None, f"{kind} is not a valid LR schedule"
    if kind == WARMUP_COSINE_LR:
        return None, f"{kind} scales the optimizer learning rate by a ratio, so its params define no lr"
    return config["params"][{LR_RANGE_TEST: LR_RANGE_TEST_MIN_LR, ONE_CYCLE: CYCLE_MAX_LR}.get(kind, WARMUP_MAX_LR)], ""


__all__ = [
    "VALID_LR_SCHEDULES",
    "WARMUP_LINEAR_RATE",
    "WARMUP_LOG_RATE",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "get_config_from_args",
    "get_lr_from_config",
]
