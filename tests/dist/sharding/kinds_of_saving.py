"""Kinds of models that meddle with what autograd keeps: checkpoints of every shape, hooks on tensors and modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from tests.dist.sharding.trainings import DIM, Block, Net, Result, Run, kind, square, train

Pass = Callable[..., torch.Tensor]


class Deep(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.outer = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.outer(torch.sin(self.norm(x)))


def _parts(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x + block.outer(torch.tanh(block.inner(block.norm(x))))


def _each(run: Run, way: Callable[[Pass, Any, torch.Tensor], torch.Tensor], reentrant: bool) -> Result:
    """Train a net whose blocks are passed in a `way` of using checkpoint."""

    def recomputed(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=reentrant)

    class Recomputing(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            return way(recomputed, self.blocks, x)

    return train(run, Recomputing(Deep))


def _blocks(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = recomputed(block, x)
    return recomputed(blocks[0], x)


def _forwards(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = recomputed(block.forward, x)
    return x


def _functions(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = recomputed(_parts, block, x)
    return x


def _parts_alone(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = x + recomputed(block.outer, torch.tanh(recomputed(block.inner, block.norm(x))))
    return x


def _several_in_one(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    def three(x: torch.Tensor) -> torch.Tensor:
        return blocks[2](_parts(blocks[1], blocks[0](x)))

    return blocks[3](recomputed(three, x))


def _nested(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return blocks[2](recomputed(blocks[1], x))

    def outer(x: torch.Tensor) -> torch.Tensor:
        return recomputed(inner, recomputed(blocks[0], x))

    return blocks[3](recomputed(outer, x))


def _sequence(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(list(blocks), 2, x, use_reentrant=False)


def _selective(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        x = checkpoint(_parts, block, x, use_reentrant=False, context_fn=contexts)
    return x


def _raw_weights(recomputed: Pass, blocks: Any, x: torch.Tensor) -> torch.Tensor:
    def raw(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ blocks[3].outer.weight) * blocks[0].norm.weight + blocks[1](x)

    return blocks[3](recomputed(raw, blocks[0](x)))


@kind()
def checkpointed_blocks(run: Run) -> Result:
    return _each(run, _blocks, False)


@kind()
def checkpointed_blocks_reentrant(run: Run) -> Result:
    return _each(run, _blocks, True)


@kind()
def checkpointed_forwards(run: Run) -> Result:
    return _each(run, _forwards, False)


@kind()
def checkpointed_forwards_reentrant(run: Run) -> Result:
    return _each(run, _forwards, True)


@kind(in_bf16=True)
def checkpointed_functions_of_parts(run: Run) -> Result:
    return _each(run, _functions, False)


@kind()
def checkpointed_functions_of_parts_reentrant(run: Run) -> Result:
    return _each(run, _functions, True)


@kind()
def checkpointed_parts(run: Run) -> Result:
    return _each(run, _parts_alone, False)


@kind()
def checkpointed_parts_reentrant(run: Run) -> Result:
    return _each(run, _parts_alone, True)


@kind()
def several_blocks_in_one_checkpoint(run: Run) -> Result:
    return _each(run, _several_in_one, False)


@kind()
def several_blocks_in_one_checkpoint_reentrant(run: Run) -> Result:
    return _each(run, _several_in_one, True)


@kind()
def nested_checkpoints(run: Run) -> Result:
    return _each(run, _nested, False)


@kind()
def nested_checkpoints_reentrant(run: Run) -> Result:
    return _each(run, _nested, True)


@kind()
def checkpointed_sequence(run: Run) -> Result:
    return _each(run, _sequence, False)


@kind()
def checkpointed_but_for_products(run: Run) -> Result:
    return _each(run, _selective, False)


@kind()
def checkpointed_raw_weights(run: Run) -> Result:
    return _each(run, _raw_weights, False)


@kind()
def checkpointed_raw_weights_reentrant(run: Run) -> Result:
    return _each(run, _raw_weights, True)


@kind()
def the_whole_model_in_a_checkpoint(run: Run) -> Result:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return square(checkpoint(model, x, use_reentrant=False))

    return train(run, Net(Deep), forward=forward)


# ---- hooks on saved tensors ---------------------------------------------------------------------------------------


def _copying() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda saved: saved)


@kind()
def saved_on_the_cpu_within_a_block(run: Run) -> Result:
    class Saving(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autograd.graph.save_on_cpu():
                return super().forward(x)

    return train(run, Net(Saving))


@kind()
def copies_saved_within_a_block(run: Run) -> Result:
    class Saving(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with _copying():
                x = super().forward(x)
            return x * self.norm.weight

    return train(run, Net(Saving))


@kind()
def copies_saved_around_all(run: Run) -> Result:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        with _copying():
            x = model.first(x) @ model.blocks[2].outer.weight
            return square(model.head(_parts(model.blocks[1], model.blocks[0](x))))

    return train(run, Net(Deep), forward=forward)


# ---- hooks on modules and tensors that read weights ---------------------------------------------------------------


@kind(in_bf16=True)
def hooks_that_read_weights(run: Run) -> Result:
    net, seen = Net(Deep), []

    def before(module: Any, args: Any) -> Any:
        return (args[0] * module.norm.weight,)

    def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + net.blocks[0].inner.bias  # type: ignore[union-attr,operator]

    def backward(module: Any, given: Any, received: Any) -> None:
        seen.append(module.outer.weight.detach().float().square().sum())
        seen.append(net.blocks[3].inner.weight.detach().float().sum())  # type: ignore[union-attr,operator]

    for block in net.blocks:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    net.blocks[1].register_full_backward_hook(backward)

    def of_prepared(step: int, model: Any) -> None:
        if step == 1:
            model.blocks[2].register_forward_pre_hook(before, prepend=True)
            model.blocks[2].register_forward_hook(after)

    return train(run, net, before=of_prepared) | {"seen": torch.stack(seen)}


@kind()
def tensor_hooks_that_read_weights(run: Run) -> Result:
    class Hooked(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            if x.requires_grad:
                x.register_hook(lambda grad: grad * self.norm.weight.detach() + grad @ self.outer.weight.detach())
            return x

    return train(run, Net(Hooked))


class _Scaled(torch.autograd.Function):
    """Keeps a weight, and reads it in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by_name = weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad * (weight + ctx.by_name.detach()) / 2, (grad * x).sum(0)


@kind()
def functions_of_their_own(run: Run) -> Result:
    class Own(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Scaled.apply(super().forward(x), self.norm.weight)

    class Nets(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            x = _Scaled.apply(x, self.blocks[3].norm.bias + 1)  # type: ignore[union-attr, operator]
            x = _Scaled.apply(x, self.blocks[3].norm.weight)  # type: ignore[union-attr]
            return super().between(x)

    return train(run, Nets(Own))
