"""What a training script reports: metrics to the dashboard and to experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distui.core.engine.step_clock import StepClock
from distui.core.errors import UserError
from distui.core.paths import current_run
from distui.core.telemetry.source import NullSource, TelemetrySource
from distui.core.trackers.trackers import Tracker, metric_values, open_trackers


class Tracking:
    """The part of `Engine` that logs: to the dashboard from every rank, to trackers from rank 0."""

    telemetry: TelemetrySource | NullSource
    clock: StepClock
    process_index: int
    destroy: Callable[[], None]

    def __init__(self) -> None:
        self.trackers: list[Tracker] = []
        """What `init_trackers` started; empty on all ranks but 0."""

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        log_with: str | Tracker | Iterable[str | Tracker] = "jsonl",
        logging_dir: str | Path | None = None,
    ) -> None:
        """Start trackers on rank 0: "jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio".

        Objects that have the methods of a tracker are taken too.

        `config` is kept with them; `init_kwargs` holds options by tracker's name. They write under `logging_dir`, which
        is the run's own folder in a launched job, else `trackers/` in the working directory.

        Raises: UserError for an unknown tracker or a missing library.
        """
        if self.process_index != 0:
            return
        run = current_run()
        folder = Path(logging_dir) if logging_dir else run.path / "trackers" if run else Path("trackers")
        self.trackers += open_trackers(log_with, project_name, folder, config, init_kwargs)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Report `values` at `step`, or the engine's own count of optimizer steps, to the dashboard and trackers.

        Raises: UserError for a value that is not one number.
        """
        numbers = metric_values(values)
        at = self.clock.step if step is None else step
        self.telemetry.metrics(at, numbers)
        for tracker in self.trackers:
            tracker.log(numbers, step=at, **(log_kwargs or {}).get(tracker.name, {}))

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Return rank 0's tracker called `name`, or with `unwrap` what it writes with; None on other ranks."""
        if self.process_index != 0:
            return None
        for tracker in self.trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        started = ", ".join(tracker.name for tracker in self.trackers) or "none"
        raise UserError(
            f"no tracker {name!r} is running", f"started: {started}", "name it in init_trackers(log_with=...)"
        )

    def end_training(self) -> None:
        """Finish the trackers and leave the process group. Collective: all ranks, last."""
        trackers, self.trackers = self.trackers, []
        for tracker in trackers:
            tracker.finish()
        self.destroy()
