"""What a training script reports: metrics to the dashboard and to experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Tracking:
    """The part of `Engine` that logs."""

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Report `values` at `step` to the dashboard."""
        self.telemetry.metrics(step or 0, {k: float(v) for k, v in values.items()})  # type: ignore[attr-defined]
