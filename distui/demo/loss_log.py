"""The loss of each step, over all ranks, on the terminal and in a file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist


class LossLog:
    """Collects losses as they are computed, and averages them over ranks every few steps, to wait seldom.

    Works in one process as it does on many ranks, so plain and distributed scripts can share it.
    """

    def __init__(self, path: str | None = None, every: int = 10) -> None:
        """`path` gets a JSON list of the steps' mean losses; a line is printed `every` so many steps."""
        self._path, self._every = path, every
        self._open: list[torch.Tensor] = []
        self._waiting: list[torch.Tensor] = []
        self.losses: list[float] = []
        """Mean over ranks and micro-batches of each step, in nats a byte; complete after `close`."""

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Note a micro-batch's `loss`, after which `step` optimizer steps were done. Collective: all ranks."""
        self._open.append(loss.detach())
        if step == len(self.losses) + len(self._waiting):
            return  # gradients accumulate: the step is not over
        self._waiting.append(torch.stack(self._open).mean())
        self._open.clear()
        if step % self._every == 0:
            self._average()
            if _rank() == 0:
                print(f"step {step:5d}  loss {self.losses[-1]:.4f} nats/byte", flush=True)

    def close(self) -> None:
        """Write the file. Collective: all ranks."""
        self._average()
        if self._path is not None and _rank() == 0:
            Path(self._path).write_text(json.dumps(self.losses))

    def _average(self) -> None:
        if not self._waiting:
            return
        losses = torch.stack(self._waiting)
        self._waiting.clear()
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        self.losses += losses.tolist()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
