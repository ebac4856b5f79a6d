"""What the engine cannot do rightly, refused before it is done wrongly."""

from __future__ import annotations

import gc
import operator
import os
from collections import defaultdict

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.units.guarded import place_of, refused_hook

_ENGINES = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_name = operator.attrgetter("__name__")


def refuse_parameters(model: nn.Module, num_ranks: int, stage: int) -> None:
    """Refuse models of which a rank cannot train its part. Raises: UserError that names the parameter or module."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None and num_ranks > 1:
            raise UserError(
                f"{name or type(model).__name__} has max_norm={module.max_norm}",
                f"its forward writes to the rows that it looks up, and each of {num_ranks} ranks looks up others",
                "set max_norm=None and scale the rows after each step: weight.data.renorm_(2, 0, max_norm)",
            )
        if num_ranks > 1 and (
            engine := next((kind for kind in map(_name, type(module).__mro__) if kind in _ENGINES), "")
        ):
            raise UserError(
                f"{name or 'the model'} is wrapped for {engine}",
                "that sums the gradients of the ranks itself, or shards the parameters, and so does distui",
                "prepare the plain model, without it: model = engine.prepare(model)",
            )
        in_script = isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None
        if in_script and num_ranks > 1 and stage > 0:
            raise UserError(
                f"{name or type(module).__name__} is a ScriptModule",
                "it reads its parameters without asking for them, and sharded ones may be on their way",
                "prepare the plain module, and compile it with torch.compile",
            )
    _refuse_prepared(model)
    params = {id(param) for param in model.parameters()}
    for name, buffer in model.named_buffers():
        if id(buffer) in params and stage >= 3 and num_ranks > 1:
            raise UserError(
                f"the buffer {name} is a parameter of the model",
                "at stage 3 parameters are whole while they are used only, and buffers always",
                "register the parameter under that name instead, or read it by its own",
            )
    _refuse_shared_memory(model)
    for name, param in model.named_parameters():
        if param._post_accumulate_grad_hooks:
            raise refused_hook(f"the parameter {name}")
        if param.is_complex():
            raise UserError(
                f"the parameter {name} is complex ({param.dtype})",
                "flat gradients and fp32 masters are real, and so are the optimizers' kernels",
                f"keep torch.view_as_real({name}) as the parameter and use torch.view_as_complex in forward",
            )


def _refuse_prepared(model: nn.Module) -> None:
    """Refuse a model that another engine trains; what is left of one that is gone is collected first."""

    def held() -> str | None:
        return next((name for name, param in model.named_parameters() if place_of(param) is not None), None)

    if held() is not None:
        gc.collect()
    if (name := held()) is not None:
        raise UserError(
            f"the parameter {name} is prepared already",
            "another engine shards and steps it",
            "prepare a model with one engine, or call free_memory() of the other first",
        )


def _refuse_shared_memory(model: nn.Module) -> None:
    """Two tensors of a model on one memory change together; after prepare each parameter has memory of its own."""
    buffers = {id(buffer) for buffer in model.buffers()}
    by_memory: defaultdict[int, list[tuple[int, int, str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            by_memory[tensor.untyped_storage().data_ptr()].append((*_extent(tensor), name, tensor))
    for tensors in by_memory.values():
        reaching: list[tuple[int, int, str, torch.Tensor]] = []
        for begin, end, other, two in sorted(tensors, key=lambda each: each[:2]):
            reaching = [each for each in reaching if each[1] > begin]
            for _, _, name, one in reaching:
                trained = any(tensor.requires_grad and id(tensor) not in buffers for tensor in (one, two))
                if one is two or not trained or not _overlap(one, two):
                    continue
                raise UserError(
                    f"{name} and {other} lie in the same memory",
                    "a step changes both in plain torch; after engine.prepare each parameter has memory of its own",
                    "tie parameters by assigning the parameter itself (a.weight = b.weight), "
                    "and compute what depends on a weight in forward",
                )
            reaching.append((begin, end, other, two))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor has, and the one behind its last."""
    last = sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()


def _overlap(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Tell whether tensors whose extents overlap have an element in common: columns of one matrix have none."""
    if one.element_size() != two.element_size():
        return True
    low = min(int(one.storage_offset()), int(two.storage_offset()))
    size = max(_extent(one)[1], _extent(two)[1]) // one.element_size() - low
    taken = torch.zeros(size, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), int(one.storage_offset()) - low).fill_(True)
    return bool(taken.as_strided(two.shape, two.stride(), int(two.storage_offset()) - low).any())


def refuse_other_data(name: str, is_saved: bool) -> None:
    """Refuse other numbers for a unit `is_saved` of for a backward, which is to see the old ones. Raises: UserError."""
    if not is_saved:
        return
    raise UserError(
        f"assigning to the data of a parameter of {name} between a forward and its backward",
        "the backward needs the numbers of the forward, and at stage 3 those that are there are gathered again for it",
        "write in place (data.copy_, data.mul_), or assign after the step",
    )


def refuse_one_queue(device: torch.device) -> None:
    """Refuse stage 3 where a GPU has one queue for all that waits. Raises: UserError."""
    if device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise UserError(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 at stage 3 with several ranks",
            "sums and gathers go over two communicators, in orders of their own: in one queue a rank's sum would wait "
            "behind a gather that its peers begin after that sum",
            "unset CUDA_DEVICE_MAX_CONNECTIONS, or use stages 0 to 2",
        )


def refuse_unseen_reads() -> None:
    """Refuse, before parameters are brought here, what would read them afterwards without asking. Raises: UserError."""
    refuse_tracing()
    _refuse_derivatives()


def _refuse_derivatives() -> None:
    """Refuse what torch.func differentiates: it saves parameters where nothing can bring them back from."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    kinds = torch._C._functorch.TransformType
    if any(level.key() in (kinds.Grad, kinds.Jvp) for level in torch._C._functorch.get_interpreter_stack() or ()):
        raise UserError(
            "a derivative by torch.func (grad, vjp, jvp, jacrev ...) over sharded parameters",
            "at stage 3 a rank holds whole parameters only while their unit runs, and such a derivative keeps them",
            "use strategy.zero_stage=2, or torch.autograd.grad, or do it inside `with engine.full_parameters(model):`",
        )


def refuse_tracing() -> None:
    """Refuse torch.jit.trace: what it records reads parameters where no hook is called that brings them here."""
    if torch.jit.is_tracing():
        raise UserError(
            "torch.jit.trace of a sharded model",
            "a traced model reads its parameters without asking for them, so it would compute with old numbers",
            "use torch.compile, or trace inside `with engine.full_parameters(model):` what is used there",
        )
