"""What `distui as accelerate test` runs on every rank: a small training gives what one process computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distui.compat.accelerate import Accelerator

BATCH = 4
STEPS = 6


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, accelerator: Any = None) -> None:
    for batch in data:
        loss = (model(batch) - batch.sum(-1, keepdim=True)).pow(2).mean()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Train on all ranks and alone, and compare. Collective. Raises AssertionError where weights differ."""
    accelerator = Accelerator()
    ranks, rank = accelerator.num_processes, accelerator.process_index
    data = torch.randn(STEPS, ranks * BATCH, 8, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(accelerator.device))
    alone, model = models
    _train(alone, torch.optim.SGD(alone.parameters(), lr=0.1), data)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _train(model, optimizer, data[:, rank * BATCH : (rank + 1) * BATCH], accelerator)
    for name, value in accelerator.get_state_dict(model).items():
        loose = accelerator.engine.config.precision.dtype != "fp32"
        right = alone.state_dict()[name].to(value.device)
        torch.testing.assert_close(value.float(), right, rtol=0.1 if loose else 1e-4, atol=0.05 if loose else 1e-5)
    gathered = accelerator.gather(torch.tensor([rank], device=accelerator.device))
    assert gathered.tolist() == list(range(ranks)), gathered
    accelerator.print(f"{ranks} ranks trained what one process trains")
    accelerator.end_training()


if __name__ == "__main__":
    main()
