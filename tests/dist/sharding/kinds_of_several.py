"""Kinds of scripts with several optimizers, or that run their backward passes their own way."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
