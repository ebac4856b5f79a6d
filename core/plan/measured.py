"""What a short run on this machine measured (`distui plan --calibrate`), as the planner uses it. Torch-free."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """One calibration: of this machine, with one number of ranks on a node."""

    num_ranks: int
    torch: str
    measured_s: float
    """When, in seconds of the epoch."""
    compute: Mapping[str, tuple[tuple[float, float, float], ...]]
    """By dtype: (hidden size, tokens of a micro-batch, FLOP/s of a rank in forward and backward)."""
    optimizer_bandwidth: float | None
    """Bytes/s of a rank that steps a fused AdamW."""
    collectives: Mapping[str, tuple[float, float]]
    """By operation: alpha (s) and beta (bytes/s, of the (N-1)/N that travels)."""
    pass_bandwidth: float | None
    """Bytes/s of a rank that scales one tensor into another, read and written bytes together."""
    baseline_bytes: int | None
    """Peak memory of a rank beyond its tensors; None on GPUs, where it is not asked for."""

    @classmethod
    def of(cls, kept: Mapping[str, Any], num_ranks: int) -> Measured | None:
        """Return what was kept for `num_ranks`, None where nothing was, or another version wrote it."""
        found = kept.get(str(num_ranks))
        if not isinstance(found, Mapping):
            return None
        try:
            return cls(
                num_ranks=num_ranks,
                torch=str(found["torch"]),
                measured_s=float(found["measured_s"]),
                compute={
                    dtype: tuple((float(width), float(tokens), float(rate)) for width, tokens, rate in rows)
                    for dtype, rows in found["compute"].items()
                },
                optimizer_bandwidth=found["optimizer_bandwidth"],
                collectives={op: (float(pair[0]), float(pair[1])) for op, pair in found["collectives"].items()},
                pass_bandwidth=found.get("pass_bandwidth"),
                baseline_bytes=found["baseline_bytes"],
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def rate(self, dtype: str, width: float, tokens: float) -> float | None:
        """Return FLOP/s for matrices of `width` and a micro-batch of `tokens`; None where the dtype was not measured.

        Between the measured points by inverse square distance in log2; beyond them the nearest point.
        """
        rows = self.compute.get(dtype)
        if not rows:
            return None
        widths, lengths = [row[0] for row in rows], [row[1] for row in rows]
        x = math.log2(min(max(width, min(widths)), max(widths)))
        y = math.log2(min(max(tokens, min(lengths)), max(lengths)))
        total = weight_sum = 0.0
        for row_width, row_tokens, rate in rows:
            distance = (math.log2(row_width) - x) ** 2 + (math.log2(row_tokens) - y) ** 2
            if distance < 1e-9:
                return rate
            total += rate / distance
            weight_sum += 1 / distance
        return total / weight_sum

    @property
    def origin(self) -> str:
        """Where the numbers are from, for explanations."""
        day = time.strftime("%Y-%m-%d", time.localtime(self.measured_s))
        ranks = f"{self.num_ranks} rank{'' if self.num_ranks == 1 else 's'}"
        return f"measured here by distui plan --calibrate, {day}, {ranks}, torch {self.torch}"
