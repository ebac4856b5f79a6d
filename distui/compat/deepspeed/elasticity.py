"""`deepspeed.elasticity`: one total batch for many numbers of ranks, from the JSON's `elasticity` section.

The batch is one of a few multiples of the micro-batches by highly composite numbers: that which most numbers of ranks
divide. `configuration.settle` takes the three batch sizes from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from distui.core.errors import UserError

LATEST_ELASTICITY_VERSION = 0.2
MINIMUM_DEEPSPEED_VERSION = "0.3.8"
DEEPSPEED_ELASTICITY_CONFIG = "DEEPSPEED_ELASTICITY_CONFIG"

_COMPOSITE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160),
    *(25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720),
)


class ElasticityError(UserError):
    """An elastic job that cannot be."""

    def __init__(self, what: str, why: str = "", fix: str = "change the JSON's elasticity section") -> None:
        super().__init__(what, why or "DeepSpeed refuses it too", fix)


class ElasticityConfigError(ElasticityError):
    """A wrong `elasticity` section."""


class ElasticityIncompatibleWorldSize(ElasticityError):
    """A number of ranks that the section does not allow."""


class ElasticityConfig:
    """An `elasticity` section, checked."""

    def __init__(self, param_dict: Mapping[str, Any]) -> None:
        """Raises: ElasticityConfigError for what is missing or wrong."""
        self.enabled = bool(param_dict.get("enabled", False))
        for key in ("max_train_batch_size", "micro_batch_sizes"):
            if self.enabled and key not in param_dict:
                raise ElasticityConfigError(f"elasticity.{key} is missing", "an elastic batch is worked out from it")
        self.max_acceptable_batch_size = param_dict.get("max_train_batch_size", 2000)
        self.micro_batches = param_dict.get("micro_batch_sizes", [2, 4, 6])
        if not isinstance(self.micro_batches, list) or not all(
            type(size) is int and size > 0 for size in self.micro_batches
        ):
            raise ElasticityConfigError(
                f"elasticity.micro_batch_sizes is {self.micro_batches!r}", "it is a list of whole numbers above 0"
            )
        self.min_gpus, self.max_gpus = param_dict.get("min_gpus", 1), param_dict.get("max_gpus", 10000)
        if not 1 <= self.min_gpus <= self.max_gpus:
            raise ElasticityConfigError(
                f"elasticity.min_gpus={self.min_gpus} and max_gpus={self.max_gpus}", "1 <= min_gpus <= max_gpus"
            )
        self.model_parallel_size = param_dict.get("model_parallel_size", 1)
        self.num_gpus_per_node = param_dict.get("num_gpus_per_node", 1)
        if self.model_parallel_size < 1 or self.num_gpus_per_node < 1:
            raise ElasticityConfigError(
                f"elasticity.model_parallel_size={self.model_parallel_size}, num_gpus_per_node="
                f"{self.num_gpus_per_node}",
                "both are above 0",
            )
        self.min_time = param_dict.get("min_time", 0)
        if self.min_time < 0:
            raise ElasticityConfigError(f"elasticity.min_time={self.min_time}", "it is minutes, 0 or more")
        self.version = float(param_dict.get("version", LATEST_ELASTICITY_VERSION))
        self.prefer_larger_batch_size = bool(param_dict.get("prefer_larger_batch", True))
        self.ignore_non_elastic_batch_info = bool(param_dict.get("ignore_non_elastic_batch_info", False))
        if self.version not in (0.1, 0.2):
            raise ElasticityConfigError(f"elasticity.version={self.version}", "there are 0.1 and 0.2")
        if self.model_parallel_size > 1 and self.version != 0.2:
            raise ElasticityConfigError(
                f"elasticity.model_parallel_size={self.model_parallel_size} with version {self.version}",
                "version 0.1 knows no model parallelism",
                "write version: 0.2",
            )


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Return whether a configuration asks for an elastic batch."""
    return bool((ds_config.get("elasticity") or {}).get("enabled", False))


def _numbers_of_ranks(total: int, micro_batches: Iterable[int], least: int, most: int) -> list[int]:
    """Return every number of ranks from `least` to `most` that divides `total` with one of the micro-batches."""
    shares = [total // micro for micro in micro_batches if total % micro == 0]
    found = {ranks for share in shares for ranks in range(least, min(most, share) + 1) if share % ranks == 0}
    return sorted(found)


def _best(micro_batches: list[int], limit: int, least: int, most: int, prefers_larger: bool) -> tuple[int, list[int]]:
    """Return the total batch with the most numbers of ranks, and those."""
    if too_large := [micro for micro in micro_batches if micro > limit]:
        raise ElasticityConfigError(
            f"elasticity.micro_batch_sizes has {too_large[0]}",
            f"no total up to {limit} (max_train_batch_size) holds it",
        )
    found: tuple[int, list[int]] = (min(micro_batches), [])
    for base in {*micro_batches, math.lcm(*micro_batches)}:
        fitting = [base * factor for factor in _COMPOSITE if base * factor <= limit]
        total = fitting[-1] if fitting else base
        ranks = _numbers_of_ranks(total, micro_batches, least, most)
        beats = total > found[0] if prefers_larger else total < found[0]
        if len(ranks) > len(found[1]) or (len(ranks) == len(found[1]) and beats):
            found = total, ranks
    if not found[1]:
        raise ElasticityConfigError(
            f"no batch up to {limit} divides among {least} to {most} ranks or nodes",
            f"the micro-batches are {micro_batches}",
            "widen elasticity.min_gpus and max_gpus, or max_train_batch_size",
        )
    return found


def _by_nodes(config: ElasticityConfig, world_size: int) -> tuple[int, list[int], int | None]:
    """Return total, numbers of data-parallel ranks and micro-batch by version 0.2, which counts in whole nodes."""
    per_node, model_parallel = config.num_gpus_per_node, config.model_parallel_size
    if per_node % model_parallel:
        raise ElasticityError(
            f"elasticity.num_gpus_per_node={per_node} with model_parallel_size={model_parallel}",
            "the first must be a multiple of the second",
        )
    micros, limit, larger = config.micro_batches, config.max_acceptable_batch_size, config.prefer_larger_batch_size
    data_ranks = per_node // model_parallel

    def micro_of(total: float) -> int | None:
        fitting = [micro for micro in micros if total // world_size % micro == 0]
        return (max(fitting) if larger else fitting[0]) if fitting else None

    least, most = config.min_gpus // per_node or 1, config.max_gpus // per_node
    total, nodes = _best(micros, limit // data_ranks, least, most or limit // data_ranks // min(micros), larger)
    total, valid = total * data_ranks, [count * data_ranks for count in nodes]
    if world_size // model_parallel in valid:
        return total, valid, micro_of(total)
    present = world_size / per_node * data_ranks
    totals = [math.floor(limit / (micro * present)) * micro * present for micro in micros]
    best = max(totals) if larger else min(totals)
    return int(best), [int(present)], micro_of(best)


def compute_elastic_config(
    ds_config: dict[str, Any], target_deepspeed_version: str, world_size: int = 0, return_microbatch: bool = False
) -> Any:
    """Return (total batch, numbers of ranks that divide it), with `world_size` or `return_microbatch` the micro-batch.

    Raises: ElasticityConfigError for a wrong section; ElasticityIncompatibleWorldSize for that number of ranks.
    """
    if not isinstance(ds_config, dict):
        raise ValueError(f"Expected ds_config to be a dictionary but received a {type(ds_config)}")
    if not elasticity_enabled(ds_config):
        raise ElasticityConfigError(
            "no elasticity section is enabled", "the batch is worked out from it", 'add "elasticity": {"enabled": true}'
        )
    config = ElasticityConfig(ds_config["elasticity"])
    if [int(part) for part in target_deepspeed_version.split("+")[0].split(".")[:3]] < [0, 3, 8]:
        raise ElasticityError(
            f"DeepSpeed {target_deepspeed_version} knows no elasticity", f"{MINIMUM_DEEPSPEED_VERSION} is the first"
        )
    micro: int | None = None
    if config.version == 0.2:
        size = world_size or os.environ.get("WORLD_SIZE", "")
        if not str(size).isnumeric():
            raise ElasticityConfigError(
                "elasticity 0.2 needs the number of ranks", f"WORLD_SIZE is {size!r}", "pass world_size"
            )
        total, valid, micro = _by_nodes(config, int(size))
    else:
        least, most = config.min_gpus, config.max_gpus
        total, valid = _best(
            config.micro_batches, config.max_acceptable_batch_size, least, most, config.prefer_larger_batch_size
        )
    if world_size > 0:
        if world_size not in valid:
            raise ElasticityIncompatibleWorldSize(
                f"World size ({world_size}) is not valid with the current list of valid GPU counts: {valid}",
                f"the elastic batch of {total} must divide into {config.micro_batches} on each rank",
                f"start with one of {', '.join(map(str, valid))} data-parallel ranks",
            )
        micro = None
    elif not return_microbatch:
        return total, valid
    if micro is None:
        fitting = [size for size in config.micro_batches if total // max(1, world_size) % size == 0]
        if not fitting:
            raise ElasticityError(f"no micro-batch of {config.micro_batches} divides {total} / {world_size}")
        micro = max(fitting)
    return total, valid, micro


def ensure_immutable_elastic_config(runtime_elastic_config_dict: Mapping[str, Any]) -> None:
    """Check that a scheduler that started the job saw the same section, if it says what it saw.

    Raises: ElasticityConfigError with what differs.
    """
    seen = os.environ.get(DEEPSPEED_ELASTICITY_CONFIG)
    if seen is None:
        return
    theirs, ours = ElasticityConfig(json.loads(seen)), ElasticityConfig(runtime_elastic_config_dict)
    for name in ("max_acceptable_batch_size", "micro_batches", "version"):
        if getattr(theirs, name) != getattr(ours, name):
            raise ElasticityConfigError(
                f"the scheduler saw {name}={getattr(theirs, name)}, the JSON says {getattr(ours, name)}",
                f"{DEEPSPEED_ELASTICITY_CONFIG} is what it saw",
                "give both the same section",
            )


__path__: list[str] = []  # DeepSpeed's files in it can be imported by their own paths (refusals.ALIASES)
