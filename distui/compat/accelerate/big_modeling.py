"""Building models without memory."""

from __future__ import annotations

from typing import Any

from distui.compat.accelerate.refusals import offered
from distui.core.sharding.start.empty import init_empty_weights as init_empty_weights
from distui.core.sharding.start.empty import init_on_device as init_on_device


def __getattr__(name: str) -> Any:
    return offered("accelerate.big_modeling", {}, name)
