"""Kinds of scripts that do more around a step: freeze, write, read, average, and change gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distui.core.errors import UserError
from tests.dist.sharding.trainings import DIM, Net, Result, Run, batch, decaying, kind, square, train

# ---- freezing -----------------------------------------------------------------------------------------------------


def _freezing(run: Run, first: int, rule: Callable[[int, int], bool], num_steps: int = 5) -> Result:
    """Train blocks that are trainable in a step by `rule(step, block)`; `first` are trainable when prepared."""
    model = Net()
    for block in model.blocks[first:]:
        block.requires_grad_(False)

    def before(step: int, model: Any) -> None:
        for index, block in enumerate(model.blocks):
            block.requires_grad_(rule(step, index))

    return train(run, model, make=decaying, before=before, num_steps=num_steps)


@kind(in_bf16=True)
def unfrozen_later(run: Run) -> Result:
    return _freezing(run, 2, lambda step, block: block < 2 or step >= 2)


@kind(in_bf16=True)
def frozen_later(run: Run) -> Result:
    return _freezing(run, 4, lambda step, block: block < 2 or step < 2)


@kind()
def trained_in_turn(run: Run) -> Result:
    return _freezing(run, 4, lambda step, block: block % 2 == step % 2)


@kind()
def trained_in_turn_from_frozen(run: Run) -> Result:
    return _freezing(run, 0, lambda step, block: block % 2 == step % 2)


@kind()
def frozen_in_parts(run: Run) -> Result:
    """Some parameters of a unit change, and the root's."""

    def before(step: int, model: Any) -> None:
        model.blocks[1].inner.bias.requires_grad = step % 2 == 0
        model.first.weight.requires_grad = step != 1
        model.head.bias.requires_grad_(step > 2)

    return train(run, Net(), make=decaying, before=before, num_steps=5)


# ---- writes between steps -----------------------------------------------------------------------------------------


def _clamp(params: Any) -> None:
    for param in params:
        param.data.clamp_(-0.2, 0.2)


@kind(in_bf16=True)
def written_through_data(run: Run) -> Result:
    return train(run, Net(), after=lambda step, model: _clamp(model.parameters()))


@kind(in_bf16=True)
def written_in_place(run: Run) -> Result:
    kept: list[nn.Parameter] = list((net := Net()).parameters())

    def after(step: int, model: Any) -> None:
        with torch.no_grad():
            for param in kept:
                param.clamp_(-0.2, 0.2)
            model.blocks[2].inner.weight[1:3] = 0.25
            model.blocks[3].inner.bias += 0.125
            model.head.weight[0].fill_(0.5)

    return train(run, net, after=after)


@kind(in_bf16=True)
def assigned_to_data(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        for param in model.parameters():
            param.data = param.data.clamp(-0.2, 0.2)
        model.blocks[0].inner.bias.data[2:5] = 0.25
        model.head.bias.data.copy_(torch.full((model.head.bias.numel(),), 0.5))

    return train(run, Net(), after=after)


@kind()
def written_by_functions_over_lists(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        params = list(model.parameters())
        with torch.no_grad():
            torch._foreach_mul_(params, 0.75)
            vector = nn.utils.parameters_to_vector(params)
            nn.utils.vector_to_parameters(vector.clamp(-0.25, 0.25), params)

    return train(run, Net(), after=after)


@kind()
def initialised_anew(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        nn.init.constant_(model.blocks[step].inner.weight, 0.1)
        nn.init.zeros_(model.head.bias)
        torch.manual_seed(step)
        model.blocks[3].inner.reset_parameters()

    return train(run, Net(), after=after)


@kind()
def written_through_detached(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        model.blocks[1].inner.weight.detach().mul_(0.5)
        model.first.weight.detach()[0] = 0.25
        model.head.weight.detach().view(-1)[:3] = 0.5

    return train(run, Net(), after=after)


@kind()
def written_between_forward_and_step(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        with torch.no_grad():
            model.blocks[2].inner.weight.mul_(0.5)
            model.first.bias.add_(0.25)

    return train(run, Net(), graded=graded)


# ---- reads between steps ------------------------------------------------------------------------------------------


@kind(in_bf16=True)
def read_right_after_the_step(run: Run) -> Result:
    seen: Result = {}
    kept = list((net := Net()).blocks[3].parameters())

    def after(step: int, model: Any) -> None:
        seen["attribute"] = model.blocks[2].inner.weight.detach().clone()
        seen["kept"] = kept[0].detach().clone()
        seen["sum"] = sum(param.detach().double().abs().sum() for param in model.blocks[1].parameters()).float()
        seen["item"] = torch.tensor([model.head.weight[0, 0].item(), float(model.first.bias.detach().max())])
        seen["numpy"] = torch.from_numpy(model.blocks[0].inner.bias.detach().float().numpy().copy())

    return train(run, net, after=after) | seen


@kind(stages=(0, 1, 2))
def part_state_dict_and_deepcopy(run: Run) -> Result:
    seen: Result = {}

    def after(step: int, model: Any) -> None:
        seen.update({f"part.{name}": value.clone() for name, value in model.blocks.state_dict().items()})
        copied = copy.deepcopy(model.blocks[1])
        seen.update({f"copy.{name}": param.detach() for name, param in copied.named_parameters()})

    return train(run, Net(), after=after) | seen


@kind(stages=(0, 1, 2))
def detached_once_and_read_ever_after(run: Run) -> Result:
    seen: dict[str, torch.Tensor] = {}

    def before(step: int, model: Any) -> None:
        if step == 1:
            seen.update({name: param.detach() for name, param in model.named_parameters()})

    found = train(run, Net(), before=before)
    return found | {f"kept.{name}": value.clone() for name, value in seen.items()}


@kind(in_bf16=True)
def averages_of_a_kept_list(run: Run) -> Result:
    kept = list((net := Net()).parameters())
    shadows = [param.detach().float().clone() for param in kept]

    def after(step: int, model: Any) -> None:
        for shadow, param in zip(shadows, kept, strict=True):
            shadow.lerp_(param.detach().float(), 0.5)

    return train(run, net, after=after) | {str(index): shadow for index, shadow in enumerate(shadows)}


@kind()
def averaged_model_made_before(run: Run) -> Result:
    net = Net()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    found = train(run, net, after=lambda step, model: average.update_parameters(model))
    return found | {f"average.{name}": value for name, value in average.module.state_dict().items()}


@kind()
def averaged_model_made_after(run: Run) -> Result:
    net, averages = Net(), []

    def before(step: int, model: nn.Module) -> None:
        if step == 0:
            if run.engine is None:
                averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
            else:
                with run.engine.full_parameters(model) as whole:
                    averages.append(AveragedModel(whole, multi_avg_fn=get_ema_multi_avg_fn(0.5)))

    found = train(run, net, before=before, after=lambda step, model: averages[0].update_parameters(model))
    return found | {f"average.{name}": value for name, value in averages[0].module.state_dict().items()}


@kind()
def one_rank_reads_and_evaluates_alone(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        if run.is_plain or run.rank != step % run.num_ranks:
            return
        level = model.blocks[step].inner.weight.abs().mean().item()
        model.eval()
        with torch.no_grad():
            level += model(batch(step + 30)).mean().item()
            level += model.blocks[3](batch(step + 31)).mean().item()
        model.train()
        assert level == level

    return train(run, Net(), after=after, num_steps=4)


# ---- gradients ----------------------------------------------------------------------------------------------------


@kind(in_bf16=True)
def clipped_by_torch(run: Run) -> Result:
    def graded(step: int, model: nn.Module) -> None:
        norm = clip_grad_norm_(model.parameters(), 0.05)
        assert float(norm) > 0.05

    return train(run, Net(), graded=graded)


@kind()
def clipped_by_torch_in_parts_and_norms(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        nn.utils.clip_grad_norm_(model.blocks[0].parameters(), 0.01)
        nn.utils.clip_grad_norm_(model.head.weight, 0.01, norm_type=float("inf"))

    return train(run, Net(), graded=graded)


@kind()
def clamped_by_torch(run: Run) -> Result:
    return train(run, Net(), graded=lambda step, model: clip_grad_value_(model.parameters(), 0.01))


@kind(stages=(0,))
def gradients_edited_and_assigned(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        for param in model.parameters():
            param.grad.mul_(0.5)
        model.blocks[1].inner.weight.grad = model.blocks[1].inner.weight.grad.sign()
        model.blocks[2].inner.bias.grad = None
        model.head.bias.grad += 0.25

    return train(run, Net(), graded=graded, make=decaying)


@kind(stages=(1, 2, 3))
def gradients_are_refused_where_a_rank_has_parts(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        if run.is_plain:
            return
        param = model.blocks[1].inner.weight
        with pytest.raises(UserError, match=r"blocks\.1\.inner\.weight\.grad cannot be read") as refused:
            print(param.grad)
        assert "engine.gradients(model)" in refused.value.fix
        with pytest.raises(UserError, match=r"cannot be assigned"):
            param.grad = torch.zeros(DIM, DIM)

    return train(run, Net(), graded=graded)


@kind(in_bf16=True)
def gradients_of_the_engine_edited_and_replaced(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        with run.gradients(model) as grads:
            grads["blocks.1.inner.weight"] = grads["blocks.1.inner.weight"].sign() * 0.1
            grads["head.bias"] = torch.full_like(grads["head.bias"], 0.1)
            for name, grad in grads.items():
                if name.startswith("blocks.2"):
                    grad.mul_(0.5)

    return train(run, Net(), graded=graded)


class _Skipping(Net):
    """Leaves a block out, another each step, and its head every second time."""

    step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if (index + self.step) % 3:
                x = block(x)
        return x if self.step % 2 else self.head(x)


@kind(in_bf16=True)
def missing_gradients_are_none(run: Run) -> Result:
    """Without a gradient nothing decays, moves by momentum or counts the step."""
    model, optimizer = run.prepare(net := _Skipping(), decaying(net))
    for model.step in range(4):
        run.backward(square(model(run.local(batch(model.step)))))
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind(optimizer={"zero_missing_gradients": True})
def missing_gradients_are_zero_where_asked(run: Run) -> Result:
    model, optimizer = run.prepare(net := _Skipping(), decaying(net))
    for model.step in range(4):
        run.backward(square(model(run.local(batch(model.step)))))
        if run.is_plain:
            for param in model.parameters():
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def hooks_on_gradients(run: Run) -> Result:
    model = Net()
    for index, block in enumerate(model.blocks):
        block.inner.weight.register_hook(lambda grad, index=index: grad * (index + 1))  # type: ignore[union-attr, operator]

    def before(step: int, model: Any) -> None:
        if step == 1:
            model.head.weight.register_hook(lambda grad: grad * 0.5)

    return train(run, model, before=before)


@kind()
def gradients_asked_for_by_weight(run: Run) -> Result:
    """The balance of two losses by their gradients at one weight, as GANs of images do."""

    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        # Every rank must see the balance of the whole batch.
        whole = model(batch(40))
        last = model.head.weight
        (first,) = torch.autograd.grad(square(whole), last, retain_graph=True)
        (second,) = torch.autograd.grad(whole.abs().mean(), last, retain_graph=True)
        balance = (first.norm() / (second.norm() + 1e-4)).detach()
        output = model(x)
        return square(output) + balance * output.abs().mean() + 0 * F.relu(output).sum()

    return train(run, Net(), forward=forward)
