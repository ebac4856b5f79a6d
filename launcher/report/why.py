"""Where a step's time goes, in order of cost, each part with what to do; and what other settings would give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distui.core.config.schema import Config
from distui.core.config.settings import parse_text
from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware
from distui.core.plan.planned import plan_of
from distui.core.plan.types import ModelSpec, Plan
from distui.proto import telemetry_pb2 as pb

WARM_UP = 0.1
"""The share of the first steps that is left out: compilation, caches, first allocations."""
WORTH = 0.02
"""A part of less is not told."""
UNEVEN = 0.05
PARTS = ("data_wait_s", "forward_s", "backward_s", "exposed_comm_s", "optimizer_s")


@dataclass(frozen=True, slots=True)
class Cost:
    """One part of the step. `gain` is the speedup if it vanished, so nothing can give more. Units: seconds."""

    name: str
    mean_s: float
    share: float
    remedy: str

    @property
    def gain(self) -> float:
        """How much faster a step would be without this part, at most."""
        return 1 / (1 - self.share) if self.share < 1 else math.inf


def costs_of(steps: Sequence[pb.StepSummary], config: Config) -> tuple[float, list[Cost]]:
    """Return the mean step and its parts, the dearest first. Raises: UserError where they are not known."""
    kept = list(steps)[math.floor(len(steps) * WARM_UP) :]
    if not kept:
        raise UserError("there is no step to look at", "the run has told of none", "let it train some steps first")
    step_s = _mean([step.step_s for step in kept])
    parts = {name: _mean([getattr(step, name) for step in kept]) for name in PARTS}
    if not any(parts.values()) or not step_s:
        raise UserError(
            "the parts of a step are not known",
            "a script without distui.Engine does not time them",
            "use the engine, or distui control RUN profile for a trace",
        )
    parts["other"] = max(0.0, step_s - sum(parts.values()))
    remedies = _remedies(kept, config, parts)
    found = [
        Cost(name.removesuffix("_s").replace("_", " "), value, value / step_s, remedies[name])
        for name, value in parts.items()
        if value / step_s >= WORTH
    ]
    return step_s, sorted(found, key=lambda cost: -cost.mean_s)


def _remedies(steps: Sequence[pb.StepSummary], config: Config, parts: Mapping[str, float]) -> dict[str, str]:
    recompute = config.activation_checkpointing.mode
    compute = "this is the training itself"
    if recompute == "full":
        compute += "; activation_checkpointing.mode = selective or none computes no forward twice, if it fits"
    optimizer = "a fused optimizer, or accumulation: fewer steps for the same samples"
    if config.offload.optimizer != "none":
        optimizer = f"offload.optimizer = {config.offload.optimizer} is the price; none, if a higher ZeRO stage fits"
    return {
        "data_wait_s": "more workers in the DataLoader (num_workers), or cheaper preparation of a sample",
        "forward_s": "this is the training itself; engine.use_kernels(model), or torch.compile of its blocks",
        "backward_s": compute,
        "exposed_comm_s": _communication(steps, config),
        "optimizer_s": optimizer,
        "other": "Python between the parts: logging or .item() each step, evaluation, checkpoints",
    }


def _communication(steps: Sequence[pb.StepSummary], config: Config) -> str:
    ranks = [step.rank_step_s for step in steps if step.rank_step_s]
    size = max((len(row) for row in ranks), default=0)
    means = [
        _mean([row[rank] for row in ranks if rank < len(row) and math.isfinite(row[rank])]) for rank in range(size)
    ]
    if means and _mean(means) and max(means) / _mean(means) - 1 > UNEVEN:
        slowest = means.index(max(means))
        return f"rank {slowest} is {max(means) / _mean(means) - 1:.0%} slower than the mean, and the others wait for it"
    fewer = "larger micro-batches or more accumulation: fewer messages a sample"
    if config.strategy.zero_stage == 3:
        return f"strategy.zero_stage = 2 sends a third less, if it fits; {fewer}"
    if config.compression.gradients == "none":
        return f"{fewer}; compression.gradients = int8 sends a quarter"
    return fewer


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What other settings would give, scaled by what was measured; None is not known. Units: seconds, bytes."""

    step_s: float | None
    plan: Plan


def changed_config(config: Config, assignments: Sequence[str]) -> Config:
    """Return the run's settings with some `section.key=value` changed. Raises: UserError."""
    from pydantic import ValidationError

    from distui.core.config.schema import keys

    tables = config.model_dump()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key not in keys():
            raise UserError(
                f"--what-if {assignment} changes no setting", "it takes section.key=value", "distui config schema"
            )
        section, _, name = key.partition(".")
        tables[section][name] = parse_text(keys()[key], text)
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise UserError("--what-if cannot be so", error.errors()[0]["msg"], "distui config schema") from error


def what_if(
    now: Config, then: Config, model: ModelSpec, hardware: Hardware, world_size: int, measured_s: float
) -> tuple[Plan | None, WhatIf | None]:
    """Return the plan of the settings as they are, and what the changed ones would give. Raises: ConfigError."""
    nodes = max(1, now.cluster.nodes)
    machine, ranks = replace(hardware, nodes=nodes), max(1, world_size // nodes)
    before, after = plan_of(now, model, machine, ranks), plan_of(then, model, machine, ranks)
    if after is None:
        return before, None
    if before is None or not before.step_s or after.step_s is None:
        return before, WhatIf(None, after)
    return before, WhatIf(measured_s * after.step_s / before.step_s, after)
