"""DeepSpeed's JSON, as `initialize` reads it: checked, its arithmetic done, as settings of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distui.compat.deepspeed.elasticity import (
    ElasticityConfigError,
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
)
from distui.compat.deepspeed_json import check_reduction, refuse_features, refuse_lost
from distui.core.config.check import check
from distui.core.config.imports import deepspeed as reader
from distui.core.config.imports.carried import flatten, truth
from distui.core.config.imports.parsing import read_json
from distui.core.config.schema import Config
from distui.core.engine.job import job_config
from distui.core.errors import ConfigError, Problem, UserError

DEFAULT_CLIPPING = 1.0
"""DeepSpeed 0.19 clips at this norm where `gradient_clipping` is absent."""
DEFAULT_SCALE_WINDOW = 1000


@dataclass(slots=True)
class DeepSpeedConfig:
    """A DeepSpeed configuration after all checks, for a job of `world_size` ranks."""

    raw: dict[str, Any]
    sections: dict[str, dict[str, Any]]
    """For `distui.Engine`."""
    config: Config
    train_batch_size: int
    micro_size: int
    accumulation: int
    flat: dict[str, Any] = field(repr=False)
    """The JSON by dotted keys."""

    @property
    def managed(self) -> bool:
        """Whether the accumulation steps tell where a step ends."""
        return bool(truth(self.get("managed_gradient_accumulation", True)))

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients are summed over the ranks, not averaged."""
        return str(self.get("gradient_allreduce_op", "mean")).lower() == "sum"

    @property
    def skips_overflows(self) -> bool:
        """Whether ZeRO leaves out a step whose gradients are not finite: always but under bf16, where a key tells."""
        sections = [section for section in ("bf16", "bfloat16") if self.enabled(section)]
        return all(truth(self.get(f"{section}.check_grad_overflow", True)) for section in sections)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key; `auto` and null count as absent."""
        value = self.flat.get(key)
        return default if value is None or value == reader.AUTO else value

    def enabled(self, section: str) -> bool:
        """Return whether a section says `enabled: true`."""
        return bool(truth(self.flat.get(f"{section}.enabled", False)))

    def random_ltd(self) -> dict[str, Any]:
        """Return the section by which layers drop tokens, with the batch sizes."""
        routing = self.section("data_efficiency").get("data_routing") or {}
        sizes = {"global_batch_size": self.train_batch_size, "micro_batch_size": self.micro_size}
        return {**(routing.get("random_ltd") or {}), **sizes}

    def section(self, name: str) -> dict[str, Any]:
        """Return a table of the JSON, empty where it is absent."""
        table = self.raw.get(name)
        return dict(table) if isinstance(table, Mapping) else {}


def load_config(config: Any) -> dict[str, Any]:
    """Return the table in `config`: a dict, or the path of a JSON file."""
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, Path)):
        path = Path(config)
        return dict(read_json(path))
    raise UserError(
        f"deepspeed.initialize got config={type(config).__name__}",
        "it takes a dict or the path of a JSON file",
        'give config="ds_config.json"',
    )


def settle(config: Any, world_size: int, **axes: int) -> DeepSpeedConfig:
    """Check a DeepSpeed configuration and return what it means for this job.

    `axes` are sizes (`tensor`, `pipeline`, `expert`) that the script says otherwise than by the JSON.

    What the job's own settings (`distui launch --zero 3`, distui.toml) set other than their default wins over the JSON.
    What the JSON asks for is obeyed or refused.

    Raises:
        ConfigError: every mistyped key, wrong value or batch size that does not fit, at once.
        NotOffered: what is asked for and not there.
    """
    raw = load_config(config)
    flat = flatten(raw)
    refuse_features(flat, has_engine=True)
    carried = reader.refuse_unknown(raw)
    refuse_lost(carried, flat)
    values = dict(carried.values)
    for axis, size in axes.items():
        said = values.setdefault(f"strategy.{axis}_parallel", size)
        if axis == "tensor" and flat.get("tensor_parallel.autotp_size") == 1:  # as good as absent, but for this
            said = 1
        if said != size:
            fix = "write the same size in both"
            raise UserError(f"two sizes of {axis} parallelism", f"{said} in the JSON, {size} in the script", fix)
    values.setdefault("optimizer.max_grad_norm", DEFAULT_CLIPPING)
    if values.get("precision.dtype") == "fp16":
        values.setdefault("precision.loss_scale_window", DEFAULT_SCALE_WINDOW)
    sections = _under_the_jobs_own(values)
    strategy = job_config({name: section for name, section in sections.items() if name == "strategy"}).strategy
    for axis, size in axes.items():
        if (own := getattr(strategy, f"{axis}_parallel")) != size:
            raise UserError(
                f"two sizes of {axis} parallelism",
                f"strategy.{axis}_parallel={own} in the settings of the job, {size} in the script",
                "take it out of the settings",
            )
    shared = strategy.tensor_parallel * strategy.pipeline_parallel * strategy.context_parallel
    if elasticity_enabled(raw):
        flat |= _elastic_batch(raw, max(1, world_size // shared))
    plan = _batch(flat, max(1, world_size // shared))
    sections["batch"] = {"global_size": None, "micro_size": plan[1], "accumulation": plan[2]}
    merged = job_config(sections)
    if problems := check(merged, world_size=world_size):
        raise ConfigError(problems)
    check_reduction(flat, merged.strategy.zero_stage)
    total, micro, accumulation = plan
    return DeepSpeedConfig(raw, sections, merged, total, micro, accumulation, flat)


def _under_the_jobs_own(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `values` by section, without those that the job's own settings say otherwise than by default."""
    job, default = job_config({}), Config()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if getattr(getattr(job, section), name) == getattr(getattr(default, section), name):
            sections.setdefault(section, {})[name] = value
    return sections


# ---- batch sizes ---------------------------------------------------------------------------------------------------

_TOTAL, _MICRO, _STEPS = reader.BATCH_KEYS
_EQUATION = f"{_TOTAL} = {_MICRO} x {_STEPS} x ranks"


def _number(flat: Mapping[str, Any], key: str, problems: list[Problem]) -> int | None:
    value = flat.get(key)
    if value is None or value == reader.AUTO:
        return None
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, int) and not isinstance(whole, bool) and whole > 0:
        return whole
    problems.append(Problem(key, f"{value!r} is not a whole number above 0", _EQUATION, f"set {key} to a whole number"))
    return None


def _batch(flat: Mapping[str, Any], ranks: int) -> tuple[int, int, int]:
    """Return the three sizes, of which one may be absent.

    Raises: ConfigError with the equation in numbers and what fits.
    """
    problems: list[Problem] = []
    total, micro, steps = (_number(flat, key, problems) for key in (_TOTAL, _MICRO, _STEPS))
    if problems:
        raise ConfigError(problems)
    if total is None and micro is None:
        auto = reader.AUTO in (flat.get(_TOTAL), flat.get(_MICRO))
        why = "auto is filled in by Transformers' Trainer only" if auto else _EQUATION
        raise _wrong(f"neither it nor {_MICRO} is given", why, f"set {_MICRO}, the samples in one forward of one rank")
    if total is None:
        assert micro is not None
        return micro * (steps or 1) * ranks, micro, steps or 1
    if micro is not None and steps is not None:
        product = micro * steps * ranks
        if product != total:
            fixes = [f"{_TOTAL} to {product}"]
            if total % (micro * ranks) == 0:
                fixes.append(f"{_STEPS} to {total // (micro * ranks)}")
            if total % (steps * ranks) == 0:
                fixes.append(f"{_MICRO} to {total // (steps * ranks)}")
            if total % (micro * steps) == 0:
                fixes.append(f"the number of ranks to {total // (micro * steps)}")
            raise _wrong(
                f"{total} is not what the other sizes give",
                f"{_MICRO} x {_STEPS} x ranks = {micro} x {steps} x {ranks} = {product}, not {total}",
                f"leave one of the three out, or set {', or '.join(fixes)}",
            )
        return total, micro, steps
    given, name = (micro, _MICRO) if micro is not None else (steps or 1, _STEPS)
    rest, remainder = divmod(total, given * ranks)
    if remainder:
        near = [str(size) for size in (total - remainder, total - remainder + given * ranks) if size]
        raise _wrong(
            f"{total} cannot be divided among the ranks",
            f"{name} x ranks = {given} x {ranks} = {given * ranks} does not divide {total}",
            f"set {_TOTAL} to {' or '.join(near)}",
        )
    return (total, micro, rest) if micro is not None else (total, rest, given)


def _elastic_batch(raw: dict[str, Any], ranks: int) -> dict[str, int]:
    """Return the three sizes that the section `elasticity` gives for so many data-parallel ranks.

    Raises: ElasticityError, also where the JSON has sizes of its own.
    """
    section = raw["elasticity"]
    total, _, micro = compute_elastic_config(raw, "0.19.8", ranks)
    ensure_immutable_elastic_config(section)
    own = [key for key in reader.BATCH_KEYS if key in raw]
    if own and not section.get("ignore_non_elastic_batch_info", False):
        raise ElasticityConfigError(
            f"{', '.join(own)} beside an elastic batch",
            f"elasticity gives train_batch_size={total} and micro-batches of {micro} on {ranks} ranks",
            "take them out, or set elasticity.ignore_non_elastic_batch_info to true",
        )
    return {_TOTAL: total, _MICRO: micro, _STEPS: total // (micro * ranks)}


def _wrong(what: str, why: str, fix: str) -> ConfigError:
    return ConfigError([Problem(_TOTAL, what, why, fix)])
