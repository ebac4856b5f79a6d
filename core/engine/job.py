"""What `distui launch` tells a rank: its configuration and its telemetry; both have defaults for a script run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from distui.core.config.schema import Config
from distui.core.config.settings import load
from distui.core.errors import ConfigError, Problem
from distui.core.paths import current_run
from distui.core.telemetry.plain_steps import stand_back
from distui.core.telemetry.source import NullSource, TelemetrySource, current, open_source


def job_config(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the launched job's configuration with `sections` (of `Engine(...)`) over it.

    Raises: ConfigError with every problem.
    """
    run = current_run()
    config = load(run.config, {}, environ={}).config if run is not None else Config()
    values = config.model_dump()
    problems = []
    for name, section in sections.items():
        if name not in values:
            problems.append(
                Problem(
                    name,
                    "is no section of the configuration",
                    f"Engine got {name}=...",
                    f"use one of {', '.join(values)}",
                )
            )
            continue
        values[name].update(section)
    if not problems:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            for found in error.errors():
                path = ".".join(str(part) for part in found["loc"][:2])
                problems.append(Problem(path, found["msg"], f"got {found['input']!r}", "see `distui config show`"))
    raise ConfigError(problems)


def say_own_choice(strategy: str) -> None:
    """Print the engine's strategy where the script chose another than the launch told in its first line."""
    if current_run() is not None and strategy != (told := job_config({}).summary()):
        print(f"distui: the script chose {strategy} (the settings: {told})", flush=True)


def job_telemetry(rank: int, local_rank: int, world_size: int) -> TelemetrySource | NullSource:
    """Return the process's telemetry source; silent outside a job.

    The launcher's rank process opens it before the script runs, and closes it when the script has ended.
    """
    stand_back()
    source = current()
    if source is not None and source.active:
        return source
    run = current_run()
    if run is None:
        return NullSource()
    settings = load(run.config, {}, environ={}).config.telemetry
    return open_source(rank, local_rank, world_size, run, settings)
