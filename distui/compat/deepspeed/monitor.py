"""DeepSpeed's monitors (`tensorboard`, `wandb`, `csv_monitor`, `comet`) on distui's trackers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from distui.compat.deepspeed.configuration import DeepSpeedConfig
from distui.core.engine.engine import Engine

_TRACKERS = {"tensorboard": "tensorboard", "csv_monitor": "csv", "wandb": "wandb", "comet": "comet_ml"}


class Monitor:
    """Writes events of rank 0 to every tracker that the JSON enables, and to the dashboard."""

    def __init__(self, engine: Engine, settings: DeepSpeedConfig) -> None:
        self._engine = engine
        wanted = [section for section in _TRACKERS if settings.enabled(section)]
        self.enabled = bool(wanted)
        for section in wanted:
            table = settings.section(section)
            options = {"wandb": {"entity": table.get("team"), "group": table.get("group")}}.get(section, {})
            engine.init_trackers(
                str(table.get("job_name") or table.get("project") or "DeepSpeedJobName"),
                config=settings.raw,
                init_kwargs={_TRACKERS[section]: {key: value for key, value in options.items() if value}},
                log_with=_TRACKERS[section],
                logging_dir=Path(table["output_path"]) if table.get("output_path") else None,
            )

    def write_events(self, event_list: Iterable[tuple[str, Any, int]]) -> None:
        """Keep events of (name, value, step)."""
        for name, value, step in event_list:
            self._engine.log({name: value}, step=step)

    def step(self, losses: Sequence[torch.Tensor], rates: Sequence[Any], samples: int) -> None:
        """Keep the loss, learning rate and loss scale of a step, under DeepSpeed's names."""
        values: dict[str, Any] = {}
        if losses:
            values["Train/Samples/train_loss"] = torch.stack([loss.float() for loss in losses]).mean()
        if rates:
            values["Train/Samples/lr"] = rates[0]
        if self._engine.scaler is not None:
            values["Train/Samples/loss_scale"] = self._engine.scaler.scale
        self._engine.log(values, step=samples)

    def close(self) -> None:
        """Finish the trackers."""
        for tracker in self._engine.trackers:
            tracker.finish()
        self._engine.trackers.clear()
