"""Where a script's metrics go beside the dashboard: files that any tool reads, TensorBoard, or its own tracker."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distui.core.errors import UserError
from distui.core.trackers.experiment_trackers import SERVICES


@runtime_checkable
class Tracker(Protocol):
    """What keeps metrics; scripts may bring their own. Only rank 0 has trackers."""

    name: str

    @property
    def tracker(self) -> Any:
        """What it writes with, for calls that this protocol does not have."""

    def start(self) -> None:
        """Open files or connections."""

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters of the run."""

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Keep the values of a step."""

    def finish(self) -> None:
        """Write what is left, and close."""


def metric_values(values: Mapping[str, Any]) -> dict[str, float]:
    """Return `values` as floats.

    Raises: UserError with every value that is no number.
    """
    floats, bad = {}, []
    for key, value in values.items():
        try:
            floats[key] = float(value)
        except (TypeError, ValueError, RuntimeError):
            shape = getattr(value, "shape", None)
            bad.append(f"{key} is {type(value).__name__}" + (f" of shape {list(shape)}" if shape is not None else ""))
    if bad:
        raise UserError(
            f"cannot log {len(bad)} of {len(values)} values",
            f"a metric is one number, but {', '.join(bad)}",
            "log a number, such as loss.mean()",
        )
    return floats


def _json_number(value: float) -> float | str:
    # Bare NaN is not JSON, and null would not tell a diverged loss from a missing one.
    return value if math.isfinite(value) else str(value)


class _Folder:
    """A folder of a run with its configuration as JSON."""

    name: str

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        self.path = logging_dir / (re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name) or "run")

    def start(self) -> None:
        """Make the folder."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the {self.name} tracker cannot write to {self.path}", str(error), "give init_trackers another folder"
            ) from error

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write config.json; what JSON does not know becomes its text."""
        text = json.dumps(dict(values), indent=2, default=str)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")


class JsonlTracker(_Folder):
    """metrics.jsonl: one object a call with `step`, `time_s` (since the epoch) and the values; appends."""

    name = "jsonl"

    @property
    def tracker(self) -> Any:
        """The open file."""
        return self._file

    def start(self) -> None:
        """Open the file; line by line, so that it can be followed."""
        super().start()
        self._file = open(self.path / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Write a line."""
        numbers = {key: _json_number(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": step, "time_s": time.time(), **numbers}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class CsvTracker(_Folder):
    """metrics.csv: a column a metric; one that comes later is added, empty in the rows before."""

    name = "csv"

    @property
    def tracker(self) -> Any:
        """The open file."""
        return self._file

    def start(self) -> None:
        """Open the file, and go on with the columns that it has."""
        super().start()
        self._columns = ["step"]
        file = self.path / "metrics.csv"
        if file.exists() and (rows := self._rows()):
            self._columns = list(rows[0])
        self._file = open(file, "a", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115

    def _rows(self) -> list[dict[str, str]]:
        with open(self.path / "metrics.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Write a row."""
        new = [key for key in values if key not in self._columns]
        if new or not self._file.tell():
            rows = self._rows()
            self._columns += new
            self._file.close()
            self._file = open(self.path / "metrics.csv", "w", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115
            writer = csv.DictWriter(self._file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        csv.DictWriter(self._file, self._columns).writerow({"step": "" if step is None else step, **values})

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker(_Folder):
    """Event files for TensorBoard."""

    name = "tensorboard"

    def __init__(self, run_name: str, logging_dir: Path, **options: Any) -> None:
        """`options` go to `SummaryWriter`."""
        super().__init__(run_name, logging_dir)
        self._options = options

    @property
    def tracker(self) -> Any:
        """The SummaryWriter."""
        return self._writer

    def start(self) -> None:
        """Open the writer. Raises UserError where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "the tensorboard tracker needs TensorBoard", str(error), "pip install tensorboard"
            ) from error
        super().start()
        self._writer = SummaryWriter(self.path, **self._options)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the configuration as text and as config.json."""
        super().store_init_configuration(values)
        text = json.dumps(dict(values), indent=2, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```")

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Write a scalar a value."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, global_step=step, **kwargs)

    def finish(self) -> None:
        """Close the writer."""
        self._writer.close()


KINDS: dict[str, Callable[..., Tracker]] = {
    kind.name: kind for kind in (JsonlTracker, CsvTracker, TensorBoardTracker, *SERVICES)
}


def open_trackers(
    log_with: str | Tracker | Iterable[str | Tracker],
    project_name: str,
    logging_dir: Path,
    config: Mapping[str, Any] | None = None,
    init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Tracker]:
    """Start the trackers that `log_with` names or holds, and give them the run's configuration.

    Raises: UserError for an unknown name, or one whose library is missing.
    """
    wanted = [log_with] if isinstance(log_with, (str, Tracker)) else list(log_with)
    trackers: list[Tracker] = []
    for entry in wanted:
        if isinstance(entry, str):
            if entry not in KINDS:
                raise UserError(
                    f"no tracker is called {entry!r}",
                    f"known: {', '.join(KINDS)}",
                    "use one of them, or give an object with start, log, store_init_configuration and finish",
                )
            entry = KINDS[entry](project_name, logging_dir, **(init_kwargs or {}).get(entry, {}))
        entry.start()
        trackers.append(entry)
    if config is not None:
        for tracker in trackers:
            tracker.store_init_configuration(config)
    return trackers
