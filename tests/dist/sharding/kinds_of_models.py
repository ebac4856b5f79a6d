"""Kinds of models that do not call block after block: other ways in, other outputs, hooks, more passes a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.dist.sharding.trainings import DIM, Block, Net, Result, Run, batch, kind, square, train

# ---- ways into a block --------------------------------------------------------------------------------------------


@kind(in_bf16=True)
def pairs_of_parts(run: Run) -> Result:
    class Pairs(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            for linear, norm in list(self.blocks):  # type: ignore[misc]
                x = x + torch.tanh(linear(norm(x)))  # type: ignore[has-type]
            return x

    return train(run, Pairs(lambda: nn.ModuleList([nn.Linear(DIM, DIM), nn.LayerNorm(DIM)])))


@kind()
def parts_of_blocks(run: Run) -> Result:
    class Parts(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + torch.tanh(block.inner(x))  # type: ignore[operator]
            return x

    return train(run, Parts())


@kind()
def forward_itself(run: Run) -> Result:
    class Direct(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block.forward(x)
            return x

    return train(run, Direct())


@kind()
def methods_of_blocks_and_model(run: Run) -> Result:
    class Encoding(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((DIM,), 1.5))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward(x) * self.scale

    class Methods(Net):
        def __init__(self) -> None:
            super().__init__(Encoding)
            self.scale = nn.Parameter(torch.full((DIM,), 0.5))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) * self.scale
            for block in self.blocks:
                x = block.encode(x)  # type: ignore[operator]
            return self.head(x)

    return train(run, Methods(), forward=lambda model, x: square(model.encode(x)))


@kind(in_bf16=True)
def raw_weights_of_other_blocks(run: Run) -> Result:
    class Raw(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 0.1 * F.linear(x, self.blocks[-1].inner.weight)  # type: ignore[union-attr,arg-type]
            x = super().between(x)
            return x + 0.1 * x @ self.blocks[1].inner.weight.T  # type: ignore[union-attr,operator]

    return train(run, Raw(), num_steps=4)


@kind()
def loss_over_parameters(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return square(model(x)) + 0.01 * sum(param.pow(2).sum() for param in model.parameters())

    return train(run, Net(), forward=forward)


@kind()
def loss_over_norms_of_parameters(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        flat = nn.utils.parameters_to_vector(model.parameters())
        norms = torch._foreach_norm([param for param in model.parameters()])
        return square(model(x)) + 0.1 * torch.linalg.vector_norm(flat) + 0.1 * torch.stack(norms).mean()

    return train(run, Net(), forward=forward)


@kind()
def loss_without_a_forward(run: Run) -> Result:
    return train(run, Net(), forward=lambda model, x: sum(param.sin().sum() for param in model.parameters()))


@kind()
def functional_call(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        doubled = {name: param * 2 for name, param in model.named_parameters()}
        return square(torch.func.functional_call(model, doubled, (x,)))

    return train(run, Net(), forward=forward)


@kind()
def gradient_through_a_step_of_its_own(run: Run) -> Result:
    """MAML: the gradient by the weights is itself differentiated."""

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        params = dict(model.named_parameters())
        # The inner step must see what plain torch sees, so its batch is the same on all ranks.
        grads = torch.autograd.grad(square(model(batch(50))), list(params.values()), create_graph=True)
        stepped = {name: param - 0.5 * grad for (name, param), grad in zip(params.items(), grads, strict=True)}
        return square(torch.func.functional_call(model, stepped, (x,)))

    return train(run, Net(), forward=forward)


# ---- outputs ------------------------------------------------------------------------------------------------------


class Box:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@dataclass
class Record:
    value: torch.Tensor


@kind()
def plain_objects(run: Run) -> Result:
    class Boxing(Block):
        def forward(self, x: Any) -> Any:
            return Box(super().forward(x.value))

    class Boxes(Net):
        def between(self, x: torch.Tensor) -> Any:
            return super().between(Box(x)).value  # type: ignore[arg-type,attr-defined]

        def forward(self, x: torch.Tensor) -> Any:
            return Box(super().forward(x))

    return train(run, Boxes(Boxing), forward=lambda model, x: square(model(x).value))


@kind()
def dataclasses_and_nested_outputs(run: Run) -> Result:
    class Recording(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return {"kept": [Record(super().forward(x))], "count": 1}

    class Records(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)["kept"][0].value
            return x

    return train(run, Records(Recording))


@kind(in_bf16=True)
def auxiliary_losses(run: Run) -> Result:
    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(DIM, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shares = self.router(x).softmax(-1)
            self.auxiliary = square(shares)
            return x + shares[:, :1] * torch.tanh(self.inner(x))

    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        return square(model(x)) + sum(block.auxiliary for block in model.blocks)

    return train(run, Net(Routed), forward=forward)


# ---- weights that are made of others ------------------------------------------------------------------------------


@kind()
def weight_norm_old(run: Run) -> Result:
    return train(run, nn.Sequential(*(nn.utils.weight_norm(nn.Linear(DIM, DIM)) for _ in range(4))))


@kind()
def weight_norm_new(run: Run) -> Result:
    return train(run, nn.Sequential(*(parametrizations.weight_norm(nn.Linear(DIM, DIM)) for _ in range(4))))


@kind()
def spectral_norm_old(run: Run) -> Result:
    return train(run, nn.Sequential(*(nn.utils.spectral_norm(nn.Linear(DIM, DIM)) for _ in range(4))))


@kind()
def spectral_norm_new(run: Run) -> Result:
    return train(run, nn.Sequential(*(parametrizations.spectral_norm(nn.Linear(DIM, DIM)) for _ in range(4))))


@kind()
def pruned(run: Run) -> Result:
    model = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(4)))
    for layer in model:
        prune.l1_unstructured(layer, "weight", 0.5)
    return train(run, model)


@kind()
def parametrized(run: Run) -> Result:
    class Symmetric(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.triu() + weight.triu(1).T

    model = Net()
    for block in model.blocks:
        parametrize.register_parametrization(block.inner, "weight", Symmetric())  # type: ignore[arg-type]

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with parametrize.cached():
            return square(model(x)) + square(model(x + 1))

    return train(run, model, forward=forward)


# ---- several passes -----------------------------------------------------------------------------------------------


@kind()
def gradient_penalty(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_(True)
        output = model(x)
        (slope,) = torch.autograd.grad(output.float().sum(), x, create_graph=True)
        return square(output) + (slope.norm(dim=1) - 1).square().mean()

    return train(run, Net(), forward=forward)


@kind()
def two_forwards(run: Run) -> Result:
    return train(run, Net(), forward=lambda model, x: F.softplus((model(x) - model(-x)).mean(1)).mean())


@kind()
def two_forwards_in_eval(run: Run) -> Result:
    return train(run, Net().eval(), forward=lambda model, x: F.softplus((model(x) - model(-x)).mean(1)).mean())


@kind()
def evaluated_between(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = model(x)
        with torch.no_grad():
            target = model(x + 1)
        model.eval()
        with torch.inference_mode():
            level = model(x - 1).mean().item()
        model.train()
        assert level == level
        return F.mse_loss(output, target)

    return train(run, Net(), forward=forward)


@kind()
def two_backwards(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), torch.optim.SGD(net.parameters(), lr=0.2))
    for step in range(3):
        output = model(run.local(batch(step)))
        run.backward(square(output), retain_graph=True)
        run.backward(output.abs().mean())
        run.backward(square(model(run.local(batch(step + 10)))))
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def two_graphs_open_at_once(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), torch.optim.SGD(net.parameters(), lr=0.2))
    for step in range(3):
        first, second = model(run.local(batch(step))), model(run.local(batch(step + 10)))
        run.backward(square(first))
        run.backward(square(second))
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)
