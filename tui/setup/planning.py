"""Strategies to choose from: the planner's ranking for a known model, the ZeRO stages for an unknown one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distui.core.config.schema import Config
from distui.core.hardware.detect import Hardware
from distui.core.plan.search import explain, plan_all
from distui.core.plan.types import ModelSpec, Plan, Term
from distui.tui.setup.failures import UnexpectedError, told_as

STRATEGY_KEYS = (
    "strategy.backend",
    "strategy.zero_stage",
    "strategy.tensor_parallel",
    "strategy.pipeline_parallel",
    "strategy.context_parallel",
    "strategy.expert_parallel",
    "strategy.shard_size",
    "precision.dtype",
    "offload.optimizer",
    "offload.params",
    "activation_checkpointing.mode",
    "compression.gradients",
)
"""What tells two strategies apart; batch sizes and the rest do not."""

PLANNER_KEYS = ("precision.dtype", "precision.reduce_dtype", "optimizer.name")
"""What the planner takes from an existing file instead of choosing it."""

STAGE_WORDS = {
    0: "every rank holds all of parameters, gradients and optimizer states",
    1: "each of the {n} ranks holds 1/{n} of the optimizer states",
    2: "each of the {n} ranks holds 1/{n} of the optimizer states and of the gradients",
    3: "each of the {n} ranks holds 1/{n} of the optimizer states, the gradients and the parameters",
}
STAGE_COST = {
    0: "one all-reduce of the gradients a step",
    1: "as much traffic as ZeRO-0: a reduce-scatter and an all-gather are one all-reduce",
    2: "as much traffic as ZeRO-0 without accumulation, the gradients once more for each further micro-batch",
    3: "half as much traffic again as ZeRO-0, since parameters are gathered for forward and for backward",
}
TRAFFIC_SOURCE = "Rajbhandari et al., ZeRO, SC 2020, section 7"


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of the strategy step: what it writes, and what is predicted of it where anything can be."""

    name: str
    values: Mapping[str, Any]
    """`section.key` -> value."""
    why: str
    plan: Plan | None = None
    """None where nothing can be predicted, because the model's size is not known."""
    available: bool = True
    is_kept: bool = False
    """Whether it is what the existing file says."""

    @property
    def fits(self) -> bool | None:
        """Whether it fits into memory; None where nothing tells."""
        if self.plan is None or self.plan.memory_limit_bytes is None:
            return None
        return self.plan.fits

    def is_like(self, other: Choice) -> bool:
        """Return whether both are the same strategy, whatever the batch."""
        return all(self.values.get(key) == other.values.get(key) for key in STRATEGY_KEYS)


def _values(config: Config) -> dict[str, Any]:
    found = {}
    for key in STRATEGY_KEYS:
        section, _, name = key.partition(".")
        found[key] = getattr(getattr(config, section), name)
    return found


def kept_choice(base: Config, file_name: str) -> Choice:
    """Return the strategy that the existing file has."""
    return Choice(base.summary(), _values(base), f"as {file_name} has it; nothing is predicted of it", is_kept=True)


def choices_without_model(world_size: int, base: Config) -> list[Choice]:
    """Return the ZeRO stages, the safe one first, for a model whose size is not known.

    Several ranks: stage 2, which never needs more memory than 0 or 1 and sends no more than they do. One rank: stage
    0, since there is nobody to share with. Precision and everything else stay as they are in `base`.
    """
    order = (2, 3, 1, 0) if world_size > 1 else (0,)
    found = []
    for stage in order:
        held = STAGE_WORDS[stage].format(n=world_size) if world_size > 1 else "one rank holds everything"
        cost = f"; {STAGE_COST[stage]} ({TRAFFIC_SOURCE})" if world_size > 1 else "; nothing is sent"
        values = {**_values(base), "strategy.backend": "native", "strategy.zero_stage": stage}
        name = f"ZeRO-{stage}, {base.precision.dtype}"
        found.append(Choice(name, values, f"{held}{cost}. Memory and speed are n/a: the model's size is not known."))
    return found


def choices_for_model(
    model: ModelSpec,
    hardware: Hardware,
    nproc: int | None,
    micro_size: int | None,
    global_size: int | None,
    stated: Mapping[str, Any],
) -> list[Choice]:
    """Return the planner's ranking, what fits first; `stated` has those of PLANNER_KEYS that the existing file sets.

    Raises:
        UserError: the hardware has not that many GPUs.
    """
    plans = plan_all(
        model,
        hardware,
        nproc=nproc,
        global_size=global_size,
        micro_size=micro_size,
        dtype=stated.get("precision.dtype"),
        reduce_dtype=stated.get("precision.reduce_dtype", "fp32"),
        optimizer=stated.get("optimizer.name", "adamw"),
    )
    return [choice_of(plan) for plan in plans]


def choice_of(plan: Plan) -> Choice:
    """Return a plan as a row of the strategy step."""
    values = {f"{section}.{key}": value for section, table in plan.to_config().items() for key, value in table.items()}
    # The sizes that a plan assumes are no answer: what the user leaves open stays the script's.
    values = {key: value for key, value in values.items() if not key.startswith("batch.")}
    return Choice(plan.name, values, plan.why, plan, plan.available)


def terms_of(choice: Choice, model: ModelSpec | None, hardware: Hardware | None) -> tuple[Term, ...]:
    """Return every number behind a prediction, with formula and source; empty where nothing is predicted."""
    if choice.plan is None or model is None or hardware is None:
        return ()
    try:
        with told_as("explaining this plan", ""):
            return tuple(explain(choice.plan, model, hardware))
    except UnexpectedError as error:
        return (Term("n/a", 0.0, "1", error.why, ""),)
