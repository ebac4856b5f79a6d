"""What an optimizer does with the closure of `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def closure_loss(closure: Callable[[], Any] | None) -> Any:
    """Return what the closure of a step returns, with gradients on as it needs them; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
