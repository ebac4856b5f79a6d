"""Kinds of scripts with several optimizers, or that run their backward passes their own way."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.dist.sharding.trainings import DIM, Net, Result, Run, batch, kind, momentum, square, steps, train

# ---- several --------------------------------------------------------------------------------------------------------


@kind()
def two_optimizers_of_parts(run: Run) -> Result:
    model: Any = Net()
    run.start |= {name: value.clone() for name, value in model.state_dict().items()}
    one: Any = torch.optim.SGD([*model.first.parameters(), *model.blocks[:2].parameters()], lr=0.2, momentum=0.9)
    two: Any = torch.optim.AdamW([*model.blocks[2:].parameters(), *model.head.parameters()], lr=0.02, eps=1e-2)
    if run.engine is not None:
        model, one, two = run.engine.prepare(model, one, two)
    for step in range(4):
        run.backward(square(model(run.local(batch(step)))))
        if step % 2:
            one.step()
        two.step()
        one.zero_grad()
        two.zero_grad(set_to_none=step != 1)
    return run.state(model)


@kind()
def zeros_of_one_of_two_optimizers(run: Run) -> Result:
    """One keeps zeros and steps by its momentum, without a backward, after the other has forgotten its own."""
    model: Any = Net()
    run.start |= {name: value.clone() for name, value in model.state_dict().items()}
    one: Any = torch.optim.SGD([*model.first.parameters(), *model.blocks.parameters()], lr=0.2, momentum=0.9)
    two: Any = torch.optim.SGD(model.head.parameters(), lr=0.2, momentum=0.9)
    if run.engine is not None:
        model, one, two = run.engine.prepare(model, one, two)
    for step in range(3):
        run.backward(square(model(run.local(batch(step)))))
        one.step()
        two.step()
        one.zero_grad(set_to_none=False)
        two.zero_grad()
        one.step()
        two.step()
    return run.state(model)


@kind()
def a_generator_and_its_critic(run: Run) -> Result:
    """The critic is stepped between a generator's forward and its backward."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = Net(num_blocks=2), Net(num_blocks=2)
            self.generator.head = nn.Linear(DIM, DIM)

    model: Any = Both()
    run.start |= {name: value.clone() for name, value in model.state_dict().items()}
    generates: Any = torch.optim.SGD(model.generator.parameters(), lr=0.1)
    criticises: Any = torch.optim.SGD(model.critic.parameters(), lr=0.1)
    if run.engine is not None:
        model, generates, criticises = run.engine.prepare(model, generates, criticises)
    for step in range(3):
        x = run.local(batch(step))
        made = model.generator(x)
        criticises.zero_grad()
        run.backward(square(model.critic(made.detach())) - 0.5 * square(model.critic(x)))
        criticises.step()
        generates.zero_grad()
        run.backward(-0.3 * square(model.critic(made)))
        generates.step()
    return run.state(model)


@kind()
def another_optimizer_later(run: Run) -> Result:
    """First the ends alone, then all of it."""
    net = Net()
    net.blocks.requires_grad_(False)
    ends = [param for param in net.parameters() if param.requires_grad]
    model, optimizer = run.prepare(net, torch.optim.SGD(ends, lr=0.2))
    steps(run, model, optimizer)
    model.requires_grad_(True)
    later: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps(run, model, later if run.engine is None else run.engine.prepare(later))
    return run.state(model)


@kind()
def a_backward_of_some(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        run.backward(square(model(run.local(batch(step)))), inputs=[model.head.weight, model.blocks[1].inner.weight])
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def plain_backwards(run: Run) -> Result:
    """Without the engine: `loss.backward()`, twice before a step."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        x = run.local(batch(step))
        square(model(x)).backward()
        (0.5 * square(model(2 * x))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def clipped_one_by_one(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        for param in model.parameters():
            clip_grad_norm_(param, 0.02)

    return train(run, Net(), graded=graded)


@kind(stages=(0,))
def plain_backwards_whose_gradients_are_read(run: Run) -> Result:
    """What is found after `loss.backward()` is the ranks' sum, not None: a scaler of torch's looks there."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for step in range(4):
        loss = square(model(run.local(batch(step)))) * (torch.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for param in model.parameters():
            if param.grad is not None:
                param.grad.mul_(0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def stepped_though_no_backward_was_the_last(run: Run) -> Result:
    """Every backward ran under `no_sync`: the last micro-batch was not known for one."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(4):
        with contextlib.nullcontext() if run.engine is None else run.engine.no_sync(model):
            run.backward(square(model(run.local(batch(step)))))
            run.backward(square(model(run.local(batch(step + 10)))))
        if step % 2:
            clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


# ---- gradients by hand ----------------------------------------------------------------------------------------------


@kind(stages=(0,))
def gradients_assigned_without_a_backward(run: Run) -> Result:
    """By `autograd.grad` and a sum of the script's own; of some parameters only; and those of a step before."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(4):
        params = list(model.parameters())[step % 2 :]
        grads = torch.autograd.grad(square(model(run.local(batch(step)))), params)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone() if run.engine is None else run.engine.reduce(grad, "mean")
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        kept = [param.grad for param in model.parameters()]
        optimizer.zero_grad()
        for param, grad in zip(model.parameters(), kept, strict=True):
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind(stages=(0,))
def gradients_seen_and_added_to_after_clipping(run: Run) -> Result:
    seen: Result = {}

    def graded(step: int, model: Any) -> None:
        before = [param.grad for param in model.parameters()] if step else []
        clip_grad_norm_(model.parameters(), 0.1)
        for param in model.parameters():
            param.grad.add_(0.01)
        clip_grad_value_(model.parameters(), 0.02)
        seen.update({f"{step}.{place}": grad.clone() for place, grad in enumerate(before)})

    return train(run, Net(), graded=graded) | seen


@kind()
def clipped_with_what_no_optimizer_steps(run: Run) -> Result:
    """What nobody steps or forgets is clipped and clamped too, and counts with all that came before."""
    net: Any = Net()
    some, norms = [*net.first.parameters(), net.blocks[1].inner.weight], []

    def graded(step: int, model: Any) -> None:
        if step == 2:
            clip_grad_value_(model.parameters(), 0.02)
        norms.append(clip_grad_norm_(model.parameters(), 0.3).clone())

    found = train(run, net, make=lambda model: torch.optim.SGD(some, lr=0.2), graded=graded, num_steps=4)
    return found | {"norms": torch.stack(norms)}


@kind()
def backwards_that_keep_their_graph(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        for step in range(3):
            run.backward(square(model(run.local(batch(step)))), create_graph=True)
            optimizer.step()
            optimizer.zero_grad()
    return run.state(model)


@kind()
def a_loss_and_a_table_prepared_as_models(run: Run) -> Result:
    class Table(nn.Module):
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.linspace(0.5, 1.5, DIM))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    loss: Any = nn.MSELoss()
    table: Any = Table()
    model, optimizer = run.prepare(net := Net(), momentum(net))
    if run.engine is not None:
        loss, table = run.engine.prepare(loss, table)

    def one(part: torch.Tensor, rank: int) -> torch.Tensor:
        output = model(table(part)) if rank else part.sum() * 0  # rank 0 has nothing to learn
        return loss(output, torch.zeros_like(output))

    for step in range(3):
        mean = run.mean_over_ranks(one, batch(step))
        run.backward(mean if mean.requires_grad else mean.requires_grad_())
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model) | {name: value.clone() for name, value in run.state(table).items()}


class _Centred(torch.optim.SGD):
    """Looks at rows of large matrices only."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if (grad := param.grad) is not None:
                    large = grad.dim() == 2 and min(grad.shape) >= DIM
                    param.sub_(grad - grad.mean(1, keepdim=True) if large else grad, alpha=group["lr"])


@kind()
def large_matrices_seen_whole(run: Run) -> Result:
    return train(run, Net(), make=lambda model: _Centred(model.parameters(), lr=0.3))
