"""Experiment trackers: TensorBoard, the services that distui knows, its own files, and what a script brings."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distui.compat.accelerate.refusals import NotOffered, offered
from distui.compat.accelerate.state import PartialState
from distui.compat.accelerate.utils.enums import LoggerType
from distui.core.trackers.trackers import KINDS, metric_values


def on_main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a tracker's method run on rank 0 only, where its `main_process_only` says so."""

    @functools.wraps(function)
    def on_main(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "main_process_only", False) or PartialState().is_main_process:
            return function(self, *args, **kwargs)
        return None

    return on_main


class GeneralTracker:
    """What scripts derive their own trackers from: `name`, `requires_logging_directory` and `tracker` are needed."""

    main_process_only = True
    name: str = ""
    requires_logging_directory = False

    def __init__(self, _blank: bool = False) -> None:
        if not _blank:
            lacking = [
                attribute
                for attribute in ("name", "requires_logging_directory", "tracker")
                if not any(attribute in vars(kind) for kind in type(self).__mro__[:-2])
                and attribute not in self.__dict__
            ]
            if lacking:
                raise NotImplementedError(
                    f"The implementation for this tracker class is missing the following required attributes: {lacking}"
                )

    def start(self) -> None:
        """Open what is needed."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the hyper-parameters."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep the values of a step."""

    def finish(self) -> None:
        """Close."""


class _FileTracker(GeneralTracker):
    """One of distui's own trackers."""

    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self._inner = KINDS[self.name](run_name, Path(logging_dir or "."), **kwargs)

    @on_main_process
    def start(self) -> None:
        """Open the files."""
        self._inner.start()

    @property
    def tracker(self) -> Any:
        """What it writes with."""
        return self._inner.tracker

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the hyper-parameters."""
        self._inner.store_init_configuration(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write numbers."""
        self._inner.log(metric_values(values), step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close the files."""
        self._inner.finish()


class JsonlTracker(_FileTracker):
    """Metrics as lines of JSON."""

    name = "jsonl"


class CsvTracker(_FileTracker):
    """Metrics as a table."""

    name = "csv"


class TensorBoardTracker(_FileTracker):
    """Event files for TensorBoard; text and dicts of numbers too."""

    name = "tensorboard"

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write scalars, texts, and groups of scalars."""
        writer = self._inner.tracker
        for key, value in values.items():
            if isinstance(value, str):
                writer.add_text(key, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                writer.add_scalars(key, value, global_step=step, **kwargs)
            else:
                writer.add_scalar(key, float(value), global_step=step, **kwargs)
        writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write images."""
        for key, value in values.items():
            self._inner.tracker.add_images(key, value, global_step=step, **kwargs)


class WandBTracker(GeneralTracker):
    """A run of Weights & Biases."""

    name = "wandb"

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name, self._options = run_name, kwargs

    @on_main_process
    def start(self) -> None:
        """Begin the run."""
        import wandb

        self.run = wandb.init(project=self.run_name, **self._options)

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the hyper-parameters."""
        self.run.config.update(values, allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep the values of a step."""
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep lists of images."""
        import wandb

        for key, images in values.items():
            self.log({key: [wandb.Image(image) for image in images]}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class _ServiceTracker(_FileTracker):
    """A run at a service; the options are those of distui's own tracker of it, `offline=True` among them."""

    requires_logging_directory = False


class MLflowTracker(_ServiceTracker):
    """A run of MLflow."""

    name = "mlflow"


class CometMLTracker(_ServiceTracker):
    """An experiment of Comet."""

    name = "comet_ml"


class ClearMLTracker(_ServiceTracker):
    """A task of ClearML."""

    name = "clearml"


class TrackioTracker(_ServiceTracker):
    """A run of trackio."""

    name = "trackio"


LOGGER_TYPE_TO_CLASS: dict[str, type[GeneralTracker]] = {
    "jsonl": JsonlTracker,
    "csv": CsvTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "mlflow": MLflowTracker,
    "comet_ml": CometMLTracker,
    "clearml": ClearMLTracker,
    "trackio": TrackioTracker,
}
_LIBRARY = {name: name for name in LOGGER_TYPE_TO_CLASS if name not in ("jsonl", "csv")}
_OTHERS = {str(member) for member in LoggerType} - set(LOGGER_TYPE_TO_CLASS) - {"all"}


def is_tracker(entry: Any) -> bool:
    """Return whether `entry` is an object derived from `GeneralTracker`, the face's or the real Accelerate's."""
    real = getattr(sys.modules.get("accelerate.tracking"), "GeneralTracker", GeneralTracker)
    return isinstance(entry, (GeneralTracker, real))


def register_tracker_class(tracker_class: Any) -> None:
    """Let `log_with` name a script's own tracker, which is made as the known ones are.

    Raises: ValueError for what is no tracker, or has no name or no `requires_logging_directory`.
    """
    real = getattr(sys.modules.get("accelerate.tracking"), "GeneralTracker", GeneralTracker)
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, (GeneralTracker, real))):
        raise ValueError(f"`tracker_class` must be a subclass of `GeneralTracker`, but got {tracker_class}.")
    for attribute in ("name", "requires_logging_directory"):
        if attribute == "name" and not getattr(tracker_class, "name", None):
            raise ValueError("The tracker class to register must define a non-empty `name` attribute.")
        if not any(attribute in vars(kind) for kind in tracker_class.__mro__ if kind is not GeneralTracker):
            raise ValueError(f"The tracker class to register must define a `{attribute}` class attribute.")
    name = str(tracker_class.name)
    if name in LOGGER_TYPE_TO_CLASS:
        warnings.warn(f"A tracker with the name '{name}' is already registered and will be overwritten", stacklevel=2)
    LOGGER_TYPE_TO_CLASS[name] = tracker_class


def _is_there(name: str) -> bool:
    library = _LIBRARY.get(name)
    return library is None or importlib.util.find_spec(library) is not None


def get_available_trackers() -> list[Any]:
    """Return the names of Accelerate's trackers that can be started here."""
    return [LoggerType(name) for name in _LIBRARY if _is_there(name)]


def filter_trackers(log_with: Any, logging_dir: Any = None) -> list[Any]:
    """Return the names and objects of `log_with` that can be started; warns of a library that is missing.

    Raises: NotOffered for one of Accelerate's trackers that distui does not have; ValueError for another name.
    """
    if log_with is None:
        return []
    wanted = list(log_with) if isinstance(log_with, (list, tuple)) else [log_with]
    if any(str(entry) == "all" for entry in wanted):
        wanted = [entry for entry in wanted if is_tracker(entry)] + get_available_trackers()
    found: list[Any] = []
    for entry in wanted:
        if is_tracker(entry):
            found.append(entry)
            continue
        name = str(entry)
        if name in _OTHERS and name not in LOGGER_TYPE_TO_CLASS and importlib.util.find_spec("accelerate"):
            theirs = importlib.import_module("accelerate.tracking")
            LOGGER_TYPE_TO_CLASS[name], _LIBRARY[name] = theirs.LOGGER_TYPE_TO_CLASS[name], name
        if name in _OTHERS and name not in LOGGER_TYPE_TO_CLASS:
            raise NotOffered(
                f"log_with={name!r} is not offered by distui",
                f"it has {', '.join(LOGGER_TYPE_TO_CLASS)}",
                "pip install accelerate: its own is then used; or pass an object derived from GeneralTracker",
            )
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"Unsupported logging capability: {name}. Choose between {list(LOGGER_TYPE_TO_CLASS)}")
        if not _is_there(name):
            warnings.warn(f"log_with={name!r}: {_LIBRARY[name]} is not installed, nothing goes there", stacklevel=3)
        elif LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and logging_dir is None:
            raise ValueError(
                f"Logging with `{name}` requires a `logging_dir` to be passed in: "
                "Accelerator(project_dir=...) or ProjectConfiguration(logging_dir=...)"
            )
        elif name not in found:
            found.append(name)
    return found


def __getattr__(name: str) -> Any:
    return offered("accelerate.tracking", {}, name)
