"""Kinds of scripts that do more with their optimizer: groups, states, closures, hooks, ways to zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.dist.sharding.trainings import DIM, Net, Result, Run, batch, kind, momentum, square, steps, train

# ---- groups ---------------------------------------------------------------------------------------------------------


@kind()
def lookahead_over_groups(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    slow = [[param.detach().clone() for param in group["params"]] for group in optimizer.param_groups]

    @torch.no_grad()
    def after(step: int, model: Any) -> None:
        for group, kept in zip(optimizer.param_groups, slow, strict=True):
            for param, own in zip(group["params"], kept, strict=True):
                own.add_(param - own, alpha=0.5)
                param.copy_(own)

    steps(run, model, optimizer, 3, after=after)
    return run.state(model)


@kind()
def clipped_over_groups(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))

    def graded(step: int, model: Any) -> None:
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], 0.1)

    steps(run, model, optimizer, 3, graded=graded)
    return run.state(model)


@kind(stages=(0,))
def gradients_edited_over_groups(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))

    def graded(step: int, model: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(0.5)

    steps(run, model, optimizer, 3, graded=graded)
    return run.state(model)


@kind()
def weights_decayed_apart(run: Run) -> Result:
    """Two groups, of which one is clipped."""
    net = Net()
    biases = [param for name, param in net.named_parameters() if name.endswith("bias")]
    weights = [param for name, param in net.named_parameters() if name.endswith("weight")]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights, "lr": 0.01}]
    model, optimizer = run.prepare(net, torch.optim.AdamW(groups, lr=0.02, weight_decay=0.5, eps=1e-2))

    def graded(step: int, model: Any) -> None:
        clip_grad_norm_(weights, 0.1)

    steps(run, model, optimizer, 3, graded=graded)
    return run.state(model)


@kind()
def hyperparameters_changed(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))

    def after(step: int, model: Any) -> None:
        for group in optimizer.param_groups:
            group.update(lr=group["lr"] * 0.5, momentum=0.5, weight_decay=0.1)

    steps(run, model, optimizer, 3, after=after)
    return run.state(model)


# ---- states ---------------------------------------------------------------------------------------------------------


@kind()
def optimizer_states_taken_back(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    steps(run, model, optimizer)
    optimizer.load_state_dict(kept)
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def optimizer_states_cleared(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    optimizer.state.clear()
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def optimizer_states_edited(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    for state in optimizer.state.values():
        state["momentum_buffer"].mul_(0.5)
    steps(run, model, optimizer)
    return run.state(model)


@kind(stages=(0,))
def optimizer_states_by_parameter(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    seen = optimizer.state[model.head.weight]["momentum_buffer"].clone()
    optimizer.state[model.blocks[0].inner.weight]["momentum_buffer"].zero_()
    steps(run, model, optimizer)
    return run.state(model) | {"momentum": seen}


# ---- steps ----------------------------------------------------------------------------------------------------------


@kind()
def a_closure(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    losses = []
    for step in range(3):
        x = run.local(batch(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = square(model(x))
            run.backward(loss)
            return loss

        losses.append(optimizer.step(closure))
    assert all(isinstance(loss, torch.Tensor) for loss in losses)
    return run.state(model)


@kind()
def hooks_around_the_step(run: Run) -> Result:
    """Registered before and after prepare; one clips, which is to count."""
    optimizer: Any = momentum(net := Net())
    calls = [0, 0]
    optimizer.register_step_post_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model, optimizer = run.prepare(net, optimizer)

    def clip(*_: Any) -> None:
        clip_grad_norm_(model.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    optimizer.register_step_post_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
    steps(run, model, optimizer, 3)
    return run.state(model) | {"calls": torch.tensor(calls)}


@kind()
def stepped_twice_with_the_same_gradients(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer, 3, graded=lambda step, model: optimizer.step())
    return run.state(model)


@kind()
def sharpness_aware(run: Run) -> Result:
    """Steps by the gradient of a place beside the weights."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        x = run.local(batch(step))
        run.backward(square(model(x)))
        with run.gradients(model) as grads:
            aside = {name: 0.05 * grad.sign() for name, grad in grads.items()}
        optimizer.zero_grad()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.add_(aside[name])
        run.backward(square(model(x)))
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.sub_(aside[name])
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


# ---- zeroing --------------------------------------------------------------------------------------------------------


@kind()
def never_zeroed(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), torch.optim.SGD(net.parameters(), lr=0.05))
    for step in range(4):
        run.backward(square(model(run.local(batch(step)))))
        optimizer.step()
    return run.state(model)


@kind()
def zeroed_before_and_a_step_left_out(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(4):
        optimizer.zero_grad()
        run.backward(square(model(run.local(batch(step)))))
        if step != 1:
            optimizer.step()
    return run.state(model)


@kind()
def zeroed_by_the_model_and_by_hand(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(4):
        run.backward(square(model(run.local(batch(step)))))
        optimizer.step()
        if step % 2:
            model.zero_grad()
        else:
            for param in model.parameters():
                param.grad = None
    return run.state(model)


@kind()
def zeroed_to_zero(run: Run) -> Result:
    """Zeros are stepped: by momentum and decay, also where nothing comes, or no backward runs at all."""
    model, optimizer = run.prepare(net := Net(), torch.optim.SGD(net.parameters(), 0.2, 0.9, weight_decay=0.1))
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        if step != 2:
            run.backward(square(model.head(model.blocks[step % 2](run.local(batch(step))))))
        optimizer.step()
    model.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()
    steps(run, model, optimizer, forward=lambda model, x: square(model.head(model.blocks[0](x))))
    return run.state(model)


@kind()
def clipped_and_then_added_to(run: Run) -> Result:
    """A clipping that was asked for before a further backward, or before gradients were dropped by hand."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        run.backward(square(model(run.local(batch(step)))))
        clip_grad_norm_(model.parameters(), 0.1)
        if step == 1:
            for param in model.parameters():
                param.grad = None
        run.backward(square(model(run.local(batch(10 + step)))))
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def clamped_in_part(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        clip_grad_value_(model.head.parameters(), 0.01)
        clip_grad_value_(model.blocks[1].inner.weight, 0.001)

    return train(run, Net(), graded=graded)


@kind()
def zeroed_to_zero_before_the_other_steps(run: Run) -> Result:
    model: Any = Net()
    run.start |= {name: value.clone() for name, value in model.state_dict().items()}
    one: Any = torch.optim.SGD([*model.first.parameters(), *model.blocks.parameters()], lr=0.2, momentum=0.9)
    two: Any = torch.optim.SGD(model.head.parameters(), lr=0.2, momentum=0.9)
    if run.engine is not None:
        model, one, two = run.engine.prepare(model, one, two)
    for step in range(3):
        run.backward(square(model(run.local(batch(step)))))
        two.step()
        two.zero_grad(set_to_none=False)
        one.step()
        one.zero_grad()
    return run.state(model)


@kind(stages=(0,))
def zeros_are_seen(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    assert all(param.grad is None for param in model.parameters())
    run.backward(square(model(run.local(batch(5)))))
    optimizer.zero_grad(set_to_none=False)
    seen = torch.stack([param.grad.abs().sum() for param in model.parameters()])
    optimizer.step()
    return run.state(model) | {"seen": seen}


@kind()
def unequal_counts_of_steps(run: Run) -> Result:
    """Plain steps before prepare, in which some parameters were frozen."""
    net = Net()
    made: Any = torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-2)
    for step in range(6):
        net.blocks[1].inner.weight.requires_grad_(step == 0)  # type: ignore[union-attr]
        net.head.bias.requires_grad_(step == 5)
        square(net(batch(20 + step))).backward()
        made.step()
        made.zero_grad()
    net.requires_grad_(True)
    model, optimizer = run.prepare(net, made)
    steps(run, model, optimizer, 3)
    return run.state(model)


class _CentredConvolutions(torch.optim.SGD):
    """Looks at whole tensors of more than three dimensions only."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is not None and grad.dim() > 3:
                    grad = grad - grad.mean(tuple(range(1, grad.dim())), keepdim=True)
                if grad is not None:
                    param.sub_(grad, alpha=group["lr"])


@kind(stages=(0,))
def tensors_of_four_dimensions_seen_whole(run: Run) -> Result:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.conv(x)).mean((2, 3)))

    def pictures(step: int) -> torch.Tensor:
        return torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(step))

    return train(run, Pictures(), make=lambda model: _CentredConvolutions(model.parameters(), lr=0.5), inputs=pictures)


@kind()
def hooks_around_every_step(run: Run) -> Result:
    """Registered for all optimizers: they see parameters, not what stands for them."""
    model, optimizer = run.prepare(net := Net(), momentum(net))

    def clip(stepped: Any, *_: Any) -> None:
        for group in stepped.param_groups:
            clip_grad_norm_(group["params"], 0.1)

    def project(stepped: Any, args: Any, kwargs: Any) -> None:
        assert args[0] is stepped
        with torch.no_grad():
            for group in stepped.param_groups:
                for param in group["params"]:
                    param.div_(param.norm().clamp(min=1))

    handles = [register_optimizer_step_pre_hook(clip), register_optimizer_step_post_hook(project)]
    try:
        steps(run, model, optimizer, 3)
    finally:
        for handle in handles:
            handle.remove()
    return run.state(model)


class _ByAttribute(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * getattr(param, "lr_multiple", 1.0) * param.grad)


@kind()
def stepped_by_attributes_of_parameters(run: Run) -> Result:
    net = Net()
    for block in net.blocks:
        block.inner.weight.lr_multiple = 0.1  # type: ignore[union-attr]
    return train(run, net, make=lambda model: _ByAttribute(model.parameters(), lr=0.2))
