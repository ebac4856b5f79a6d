"""What a training script reports: metrics to the dashboard and to experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distui.core.errors import UserError
from distui.core.paths import current_run
from distui.core.trackers import Tracker, metric_values, open_trackers

if TYPE_CHECKING:
    from distui.core.engine import Engine


class Tracking:
    """The part of `Engine` that logs; trackers live on rank 0 only."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []

    def init_trackers(
        self: Engine,  # type: ignore[misc]
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        log_with: Any = "jsonl",
        logging_dir: str | Path | None = None,
    ) -> None:
        """Start the experiment trackers `log_with`: names (jsonl, csv, tensorboard) or objects of your own.

        They write to `logging_dir`; unset it is `trackers/` in the run's folder, or the working directory alone.
        """
        if not self.is_main_process:
            return
        run = current_run()
        folder = Path(logging_dir) if logging_dir is not None else (run.path if run else Path.cwd()) / "trackers"
        self._trackers += open_trackers(log_with, project_name, folder, config, init_kwargs)

    def log(self: Engine, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:  # type: ignore[misc]
        """Report `values` to the dashboard and to the trackers; `step` unset is the optimizer's last step."""
        at = self.clock.step if step is None else step
        if not self.is_main_process:
            return
        numbers = metric_values(values)
        self.telemetry.metrics(at, numbers)
        for tracker in self._trackers:
            tracker.log(numbers, step=at, **kwargs)

    def get_tracker(self: Engine, name: str, unwrap: bool = False) -> Any:  # type: ignore[misc]
        """Return the tracker `name`, or with `unwrap` what it wraps; None on other ranks than 0."""
        if not self.is_main_process:
            return None
        for tracker in self._trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        raise UserError(
            f"there is no tracker {name!r}",
            f"started are: {', '.join(tracker.name for tracker in self._trackers) or 'none'}",
            f"call engine.init_trackers(..., log_with={name!r}) first",
        )

    def end_training(self: Engine) -> None:  # type: ignore[misc]
        """Finish the trackers and wait for the other ranks. Collective: all ranks."""
        self.wait_for_everyone()
        for tracker in self._trackers:
            tracker.finish()
        self._trackers.clear()
