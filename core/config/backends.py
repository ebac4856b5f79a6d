"""Which backends can be named, ours and those of entry points, and what each cannot do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from distui.core.config.schema import Config
from distui.core.config.settings import nearest
from distui.core.errors import Problem

GROUP = "distui.backends"

BUILT_IN = {
    "native": "distui.core.backends.native:NativeBackend",
    "ddp": "distui.core.backends.ddp:DDPBackend",
    "fsdp2": "distui.core.backends.fsdp2:FSDP2Backend",
    "deepspeed": "distui.core.backends.deepspeed:DeepSpeedBackend",
}
"""Registered in pyproject.toml as well; here so that they are found when distui runs without being installed."""

STAGES = {"native": (0, 1, 2, 3), "ddp": (0,), "fsdp2": (2, 3), "deepspeed": (0, 1, 2, 3)}
"""What `strategy.zero_stage` may be under each backend."""

PLACES = {
    "ddp": "ddp keeps every state whole on every rank, which is stage 0",
    "fsdp2": "fully_shard cuts parameters, gradients and states alike: stage 3, or 2 to keep parameters after forward",
}

DEEPSPEED_PIP = 'pip install "distui[deepspeed]"'


def registered() -> dict[str, EntryPoint]:
    """Return every backend by name. Ours cannot be replaced under their names."""
    others = {point.name: point for point in entry_points(group=GROUP)}
    return others | {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}


def find_backend(name: str) -> EntryPoint | None:
    """Return one backend; ours are found without a look through all installed packages, which takes some 10 ms."""
    if (value := BUILT_IN.get(name)) is not None:
        return EntryPoint(name, value, GROUP)
    return registered().get(name)


def check_backend(config: Config) -> Iterator[Problem]:
    """Yield every problem of `strategy.backend` and of what does not go with it."""
    name = config.strategy.backend
    if name not in BUILT_IN:
        # Only now: the planner checks hundreds of plans.
        names = sorted(registered())
        if name not in names:
            near = nearest(name, names)
            yield Problem(
                "strategy.backend",
                f"no backend is called {name!r}",
                f"registered in the entry points distui.backends: {', '.join(names)}",
                f"write {near}" if near else "name one of these, or install the package that registers it",
            )
        yield from axes_problems(config)
        return
    if name == "native":
        return
    if name == "deepspeed" and find_spec("deepspeed") is None:
        yield Problem(
            "strategy.backend",
            "backend=deepspeed, and DeepSpeed is not installed",
            "it is an extra: nothing else of distui needs it",
            f"{DEEPSPEED_PIP}, or set strategy.backend to native, which has stages 0 to 3 as well",
        )
    yield from _stage(name, config.strategy.zero_stage)
    yield from _only_native(config)
    yield from _formats(name, config)


def _stage(name: str, stage: int) -> Iterator[Problem]:
    if stage in STAGES[name]:
        return
    can = " or ".join(str(stage) for stage in STAGES[name])
    others = [other for other, stages in STAGES.items() if stage in stages]
    yield Problem(
        "strategy.zero_stage",
        f"zero_stage={stage} with backend={name}",
        PLACES[name],
        f"set strategy.zero_stage to {can}, or strategy.backend to {' or '.join(others)}",
    )


def axes_problems(config: Config) -> Iterator[Problem]:
    """Yield the axes inside a model that a backend would not see: its ranks would compute the same side by side."""
    if config.strategy.backend != "native":
        axes = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")
        yield from _without(config, [("strategy", axis, getattr(config.strategy, axis), 1) for axis in axes])
        yield from _without(config, [("strategy", "shard_size", config.strategy.shard_size, 0)])


def _only_native(config: Config) -> Iterator[Problem]:
    yield from axes_problems(config)
    off: list[tuple[str, str, object, object]] = [
        ("offload", "optimizer", config.offload.optimizer, "none"),
        ("offload", "params", config.offload.params, "none"),
        ("compression", "gradients", config.compression.gradients, "none"),
        ("compression", "weights", config.compression.weights, "none"),
        ("activation_checkpointing", "mlp_tile", config.activation_checkpointing.mlp_tile, 0),
        ("activation_checkpointing", "loss_tile", config.activation_checkpointing.loss_tile, 0),
    ]
    yield from _without(config, off)


def _without(config: Config, off: list[tuple[str, str, object, object]]) -> Iterator[Problem]:
    name = config.strategy.backend
    for section, key, value, without in off:
        if value != without:
            yield Problem(
                f"{section}.{key}",
                f"{key}={value} with backend={name}",
                "only the native backend does this",
                f"set {section}.{key} to {without}, or strategy.backend to native",
            )


def _formats(name: str, config: Config) -> Iterator[Problem]:
    dtype, reduce_dtype = config.precision.dtype, config.precision.reduce_dtype
    if name == "ddp" and dtype != "fp32" and reduce_dtype == "same":
        yield Problem(
            "precision.reduce_dtype",
            f"reduce_dtype=same with backend=ddp and dtype={dtype}",
            "ddp keeps parameters and gradients in fp32 and computes by autocast, so gradients travel in fp32",
            "set precision.reduce_dtype to fp32, or strategy.backend to native or fsdp2",
        )
