"""Trackers of experiment services: Weights & Biases, MLflow, Comet, ClearML, trackio; each needs its own package.

Where a service has an offline mode, `offline=True` among its options takes it: nothing leaves the machine then.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distui.core.errors import UserError


def _package(name: str, tracker: str, distribution: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the {tracker} tracker needs {distribution or name}", str(error), f"pip install {distribution or name}"
        ) from error


class _Service:
    """A run at a service; `options` go to the call that opens it."""

    name: str

    def __init__(self, run_name: str, logging_dir: Path, *, offline: bool = False, **options: Any) -> None:
        self._project, self._folder, self._offline, self._options = run_name, logging_dir, offline, options
        self._run: Any = None

    @property
    def tracker(self) -> Any:
        """The service's own run, for calls that have no name here."""
        return self._run

    def _make_folder(self) -> str:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the {self.name} tracker cannot write to {self._folder}",
                str(error),
                "give init_trackers another logging_dir",
            ) from error
        return os.fspath(self._folder)


class WandbTracker(_Service):
    """Weights & Biases; `options` go to `wandb.init`."""

    name = "wandb"

    def start(self) -> None:
        """Open the run."""
        wandb = _package("wandb", self.name)
        options = {"project": self._project, "dir": self._make_folder(), **self._options}
        if self._offline:
            options["mode"] = "offline"
        self._run = wandb.init(**options)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration with the run."""
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Send the values of a step."""
        self._run.log(dict(values), step=step, **kwargs)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class MlflowTracker(_Service):
    """MLflow; `options` go to `mlflow.start_run`. Offline is a file store in the logging folder."""

    name = "mlflow"

    def start(self) -> None:
        """Open the run in an experiment that is called like the project."""
        mlflow = _package("mlflow", self.name)
        if self._offline:
            # The folder holds everything; newer versions keep plain file stores behind this variable.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((Path(self._make_folder()) / "mlruns").resolve().as_uri())
        mlflow.set_experiment(self._project)
        self._mlflow, self._run = mlflow, mlflow.start_run(**self._options)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration as parameters, which MLflow limits to texts of 500 characters."""
        self._mlflow.log_params({key: str(value)[:500] for key, value in values.items()})

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Send the values of a step."""
        self._mlflow.log_metrics(dict(values), step=step, **kwargs)

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class CometTracker(_Service):
    """Comet; `options` go to `comet_ml.Experiment`, or `OfflineExperiment`."""

    name = "comet_ml"

    def start(self) -> None:
        """Open the experiment."""
        comet = _package("comet_ml", self.name)
        options = {"project_name": self._project, **self._options}
        if self._offline:
            self._run = comet.OfflineExperiment(offline_directory=self._make_folder(), **options)
        else:
            self._run = comet.Experiment(**options)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration as parameters."""
        self._run.log_parameters(dict(values))

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Send the values of a step."""
        self._run.log_metrics(dict(values), step=step, **kwargs)

    def finish(self) -> None:
        """End the experiment."""
        self._run.end()


class ClearmlTracker(_Service):
    """ClearML; `options` go to `Task.init`."""

    name = "clearml"

    def start(self) -> None:
        """Open the task."""
        clearml = _package("clearml", self.name)
        if self._offline:
            os.environ["CLEARML_CACHE_DIR"] = self._make_folder()
            clearml.Task.set_offline(offline_mode=True)
        options = {"project_name": self._project, "task_name": self._project, "auto_connect_frameworks": False}
        self._run = clearml.Task.init(**{**options, "reuse_last_task_id": False, **self._options})

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration with the task."""
        self._run.connect_configuration(dict(values), name="config")

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Send the values of a step; `train/loss` is the series loss of the plot train."""
        logger = self._run.get_logger()
        for key, value in values.items():
            title, _, series = key.partition("/")
            if step is None:
                logger.report_single_value(key, value, **kwargs)
            else:
                logger.report_scalar(title, series or title, value, iteration=step, **kwargs)

    def finish(self) -> None:
        """End the task."""
        self._run.close()


class TrackioTracker(_Service):
    """trackio, which keeps everything on this machine unless it is given a space; `options` go to `trackio.init`."""

    name = "trackio"

    def start(self) -> None:
        """Open the run."""
        if self._offline:
            os.environ["TRACKIO_DIR"] = self._make_folder()
        trackio = _package("trackio", self.name)
        self._trackio, self._run = trackio, trackio.init(project=self._project, **self._options)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration with the run."""
        self._run.config.update(dict(values))

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Send the values of a step."""
        self._trackio.log(dict(values), step=step, **kwargs)

    def finish(self) -> None:
        """End the run."""
        self._trackio.finish()


SERVICES = (WandbTracker, MlflowTracker, CometTracker, ClearmlTracker, TrackioTracker)
