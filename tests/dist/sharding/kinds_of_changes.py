"""Kinds of scripts that change a prepared model, swap its weights, or have one of an uncommon make."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from tests.dist.sharding.trainings import DIM, OUT, Block, Net, Result, Run, batch, kind, momentum, square, steps, train

# ---- the model itself -----------------------------------------------------------------------------------------------


@kind()
def tied_after_prepare(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    model.blocks[2].inner.weight = model.blocks[0].inner.weight
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def a_block_and_a_parameter_replaced(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    torch.manual_seed(5)
    model.blocks[1] = Block()
    model.head.bias = nn.Parameter(torch.ones(OUT))
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def a_block_deleted(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    del model.blocks[3]
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def forwards_replaced(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    plain, block = model.forward, model.blocks[1]
    block.forward = lambda x: x + 2 * block.inner(x)
    model.forward = lambda x: plain(x) * 0.5
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def moved_and_cast_to_where_it_is(run: Run) -> Result:
    return train(run, Net(), after=lambda step, model: model.to("cpu").float())


@kind()
def hooks_that_change_what_passes(run: Run) -> Result:
    def halve(module: nn.Module, grads: Any, outer: Any) -> Any:
        return (grads[0] * 0.5,)

    net = Net()
    for block in net.blocks:
        block.register_full_backward_hook(halve)
        block.register_forward_hook(lambda module, args, output: output * 0.9)
    model, optimizer = run.prepare(net, momentum(net))
    model.blocks[0].register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))
    steps(run, model, optimizer)
    return run.state(model)


# ---- weights swapped ------------------------------------------------------------------------------------------------


@kind(in_bf16=True)
def data_swapped_and_swapped_back(run: Run) -> Result:
    """As averages are stored, used and restored; `data` is not copied."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    others = [0.5 * param.detach().clone() for param in model.parameters()]
    seen: Result = {}

    def after(step: int, model: Any) -> None:
        kept = [param.data for param in model.parameters()]
        for param, other in zip(model.parameters(), others, strict=True):
            param.data = other
        with torch.no_grad():
            seen[f"output {step}"] = model(batch(9).to(others[0].dtype)).clone()
        for param, own in zip(model.parameters(), kept, strict=True):
            param.data = own

    steps(run, model, optimizer, 3, after=after)
    return run.state(model) | seen


@kind()
def data_swapped_for_good(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    others = [0.5 * param.detach().clone() for param in model.parameters()]
    steps(run, model, optimizer)
    kept = [param.data for param in model.parameters()]
    before = [value.clone() for value in kept]
    for param, other in zip(model.parameters(), others, strict=True):
        param.data = other
    assert all(torch.equal(one, two) for one, two in zip(kept, before, strict=True)), "nobody wrote to these"
    steps(run, model, optimizer)
    return run.state(model)


@kind(stages=(0, 1, 2))
def data_assigned_between_forward_and_backward(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        loss = square(model(run.local(batch(step))))
        weight = model.blocks[1].inner.weight
        weight.data = 0.5 * weight.data
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


@kind()
def turned_in_its_own_memory(run: Run) -> Result:
    """A square weight is transposed by its data, and others by columns of a matrix that they share."""

    def after(step: int, model: Any) -> None:
        weight = model.blocks[1].inner.weight
        weight.data = weight.data.t()

    net = Net()
    both = torch.randn(DIM, 2 * DIM)
    net.blocks[2].inner.weight = nn.Parameter(both[:, :DIM])  # type: ignore[union-attr]
    net.blocks[3].inner.weight = nn.Parameter(both[:, DIM:])  # type: ignore[union-attr]
    return train(run, net, after=after)


@kind()
def averages_copied_in_and_out(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    averages = [param.detach().clone() for param in model.parameters()]
    seen: Result = {}

    @torch.no_grad()
    def after(step: int, model: Any) -> None:
        kept = []
        for average, param in zip(averages, model.parameters(), strict=True):
            average.lerp_(param, 0.5)
            kept.append(param.detach().clone())
            param.data.copy_(average)
        seen[f"output {step}"] = model(batch(9)).clone()
        for own, param in zip(kept, model.parameters(), strict=True):
            param.data.copy_(own)

    steps(run, model, optimizer, 3, after=after)
    return run.state(model) | seen


@kind()
def written_as_one_vector(run: Run) -> Result:
    def after(step: int, model: Any) -> None:
        vector_to_parameters(parameters_to_vector(model.parameters()) * 0.9, model.parameters())

    return train(run, Net(), after=after)


@kind()
def the_best_weights_taken_back(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    best = copy.deepcopy(run.state(model))
    steps(run, model, optimizer)
    if run.engine is not None and run.stage == 3:
        run.engine.load_state_dict(model, best)
    else:
        model.load_state_dict(best)
    steps(run, model, optimizer)
    return run.state(model)


@kind()
def adapters_merged_and_unmerged(run: Run) -> Result:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(DIM, DIM).requires_grad_(False)
            self.down, self.up = nn.Parameter(torch.randn(2, DIM) * 0.3), nn.Parameter(torch.randn(DIM, 2) * 0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.down.T @ self.up.T

    model, optimizer = run.prepare(net := Net(Adapted), momentum(net))
    steps(run, model, optimizer)
    with torch.no_grad():
        for block in model.blocks:
            block.base.weight += block.up @ block.down
        seen = model(batch(3)).clone()
        for block in model.blocks:
            block.base.weight -= block.up @ block.down
    steps(run, model, optimizer)
    return run.state(model) | {"seen": seen}


class Showing(Block):
    """Hands out what it computes with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shown = [] if torch.is_grad_enabled() else [self.inner.weight.detach(), self.inner.bias.view(-1)]
        return super().forward(x)


@kind()
def written_by_views_that_blocks_handed_out(run: Run) -> Result:
    """They are written to when the block is over, and gone before anything else is done."""

    @torch.no_grad()
    def after(step: int, model: Any) -> None:
        model(run.local(batch(step)))
        for block in model.blocks:
            for view in block.shown:
                view.mul_(0.95)
            block.shown.clear()
            del view

    return train(run, Net(Showing), num_steps=4, after=after)


@kind()
def written_by_data_after_other_reads(run: Run) -> Result:
    """Frozen blocks are read in the order of earlier steps, which fetches ahead what is written here and there."""

    @torch.no_grad()
    def after(step: int, model: Any) -> None:
        for block in model.blocks:
            block.inner.weight.data += 0.1
            row = block.inner.weight.data[3]
            for other in model.blocks:
                row += 0.01 * other.inner.bias.mean()

    net = Net()
    net.blocks.requires_grad_(False)
    return train(run, net, num_steps=4, after=after)


@kind()
def the_whole_model_pickled(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    steps(run, model, optimizer)
    file = io.BytesIO()
    if run.engine is None:
        torch.save(model, file)
    else:
        with run.engine.full_parameters(model) as whole:
            torch.save(whole, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(type(param) is nn.Parameter for param in loaded.parameters())
    steps(run, model, optimizer)
    return run.state(model) | {f"saved {name}": value.clone() for name, value in loaded.state_dict().items()}


# ---- inference mode, teachers, transforms ---------------------------------------------------------------------------


@kind()
def evaluated_in_inference_mode(run: Run) -> Result:
    """From the first forward on: what is made then is used in training."""
    model, optimizer = run.prepare(net := Net(), momentum(net))
    seen: Result = {}

    def evaluate(step: int, model: Any) -> None:
        with torch.inference_mode():
            seen[f"output {step}"] = model(batch(50 + step)).clone()
            seen[f"norms {step}"] = torch.stack([param.norm() for param in model.parameters()]).clone()

    evaluate(-1, model)
    steps(run, model, optimizer, 3, after=evaluate)
    return run.state(model) | seen


@kind(stages=(3,), offload={"optimizer": "cpu", "params": "cpu"})
def evaluated_in_inference_mode_from_host_memory(run: Run) -> Result:
    return evaluated_in_inference_mode(run)


@kind()
def a_teacher_that_follows(run: Run) -> Result:
    teacher: Any = Net()
    model, optimizer = run.prepare(net := Net(), momentum(net))
    if run.engine is not None:
        teacher = run.engine.prepare(teacher)

    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return F.mse_loss(model(x), wanted + 1)

    @torch.no_grad()
    def after(step: int, model: Any) -> None:
        for one, other in zip(teacher.parameters(), model.parameters(), strict=True):
            one.lerp_(other, 0.1)

    steps(run, model, optimizer, 3, forward=forward, after=after)
    return run.state(model) | {f"teacher {name}": value for name, value in run.state(teacher).items()}


@kind()
def mapped_over_samples(run: Run) -> Result:
    return train(run, Net(), forward=lambda model, x: square(torch.func.vmap(model)(x)))


@kind(stages=(0, 1, 2))
def derivatives_by_torch_func(run: Run) -> Result:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(lambda sample: model(sample).sum()))(x)
        return square(model(x)) + slopes.square().mean()

    return train(run, Net(), forward=forward)


@kind()
def adversarial_inputs_with_frozen_weights(run: Run) -> Result:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_(True)
        model.requires_grad_(False)
        (slope,) = torch.autograd.grad(square(model(x)) * len(x), x)
        model.requires_grad_(True)
        return square(model((x + 0.1 * slope.sign()).detach()))

    return train(run, Net(), forward=forward)


@kind()
def frozen_between_forward_and_backward(run: Run) -> Result:
    model, optimizer = run.prepare(net := Net(), momentum(net))
    for step in range(3):
        loss = square(model(run.local(batch(step))))
        model.blocks[1].requires_grad_(step != 1)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return run.state(model)


# ---- of an uncommon make --------------------------------------------------------------------------------------------


@kind()
def sparse_and_pooled_embeddings(run: Run) -> Result:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bags = nn.Embedding(20, DIM, sparse=True), nn.EmbeddingBag(20, DIM, mode="sum")
            self.block, self.head = Block(), nn.Linear(DIM, OUT)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.words(ids[:, 0]) + self.bags(ids)))

    def ids(step: int) -> torch.Tensor:
        return torch.randint(0, 20, (12, 3), generator=torch.Generator().manual_seed(step))

    return train(run, Words(), make=lambda model: torch.optim.SGD(model.parameters(), lr=0.2), inputs=ids)


@kind()
def of_several_formats(run: Run) -> Result:
    """A block in float64 between others, channels in the last place, a transposed parameter."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs: Any = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.convs = convs.to(memory_format=torch.channels_last)
            self.wide, self.head = nn.Linear(3, 3).double(), nn.Linear(3, OUT)
            self.head.weight = nn.Parameter(torch.randn(3, OUT).t())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                x = x + torch.tanh(conv(x))
            return self.head(self.wide(x.mean((2, 3)).double()).float())

    def images(step: int) -> torch.Tensor:
        made = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        return made.to(memory_format=torch.channels_last)

    return train(run, Mixed(), inputs=images)


@kind()
def all_in_float64(run: Run) -> Result:
    def graded(step: int, model: Any) -> None:
        clip_grad_norm_(model.parameters(), 0.5)
        clip_grad_norm_(model.parameters(), 4.0, norm_type=1.0)

    return train(run, Net().double(), forward=lambda model, x: square(model(x.double())), graded=graded)
