"""DeepSpeed's helpers: distui's own engine takes DeepSpeed's place, so these refuse to be used."""

from __future__ import annotations

from typing import Any

from distui.compat.accelerate.refusals import offered


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.deepspeed", {}, name)
