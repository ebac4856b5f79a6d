"""Small models of a pipeline's tests: what fails, what is refused, and what asks for gradients in its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.dist.parallel.trainings import VOCAB


class Failing(nn.Module):
    """A chain of blocks, one of which fails in its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 1)
        self.calls = 0

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x_BTD = self.embedding(ids_BT)
        for index, block in enumerate(self.blocks):
            if index == 3 and self.calls == 3:
                raise ValueError("the third forward fails")
            x_BTD = block(x_BTD)
        return self.head(x_BTD).mean()


class Residual(Failing):
    """Adds something between its blocks."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = x_BTD + block(x_BTD)
        return self.head(x_BTD).mean()


class Backwards(Failing):
    """Calls its blocks in another order than they are in."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in reversed(self.blocks):
            x_BTD = block(x_BTD)
        return self.head(x_BTD).mean()


class Skipping(Failing):
    """Gives every block the embedding beside the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(4))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = first_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, first_BTD)
        return self.head(x_BTD).mean()


class NoLoss(Failing):
    """Gives no loss."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)


class Looking(Failing):
    """Adds the embedding to what the blocks give, which is on another stage."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        first_BTD = x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD + first_BTD).mean()


class Collecting(Failing):
    """Has a loss of the hidden states between its blocks."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden = [self.embedding(ids_BT)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return self.head(hidden[-1]).mean() + hidden[1].square().mean()


class Inward(Failing):
    """Has blocks that ask for gradients of their own, and a weight with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Asking(8, 8) for _ in range(4))
        block: Any = self.blocks[3]
        block.weight.register_hook(lambda grad: grad * 3.0)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD).square().mean()


class Asking(nn.Linear):
    """Adds the gradient of a sum with regard to its input."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            z_BTD = x_BTD.detach().requires_grad_()
            (found,) = torch.autograd.grad(torch.tanh(super().forward(z_BTD)).sum(), z_BTD)
        return torch.tanh(super().forward(x_BTD)) + 0.1 * found.detach()


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("this backward fails")


class FailingBackward(Failing):
    """A chain of blocks; the backward behind the second one fails."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD).mean()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Broken(8, 8, index) for index in range(4))


class Broken(nn.Linear):
    def __init__(self, inputs: int, outputs: int, index: int) -> None:
        super().__init__(inputs, outputs)
        self.index = index

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x_BTD)
        return _Broken.apply(found) if self.index == 1 else found


KINDS = {
    kind.__name__: kind
    for kind in (Failing, FailingBackward, Residual, Backwards, Skipping, NoLoss, Looking, Collecting)
}
