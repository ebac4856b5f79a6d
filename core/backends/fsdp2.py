"""torch's `fully_shard` (FSDP2): every parameter a `DTensor` cut along its first dimension, gathered block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distui.core.backends.forward import Body, Through, restore_forward
from distui.core.backends.plain import PlainBackend, PlainOptimizer
from distui.core.backends.plain_items import local
from distui.core.ranks.precision import DTYPES, apply_border_casts
from distui.core.sharding.transport.alike import start_alike
from distui.core.sharding.units.partition import partition, shared_params


class FSDP2Optimizer(PlainOptimizer):
    """Steps this rank's piece of each parameter as a plain tensor: fused kernels do not know `DTensor`."""

    def __init__(self, inner: torch.optim.Optimizer, group: dist.ProcessGroup, models: list[nn.Module]) -> None:
        super().__init__(inner, group)
        self._models = models
        self.held = []
        for param_group in inner.param_groups:
            for index, param in enumerate(param_group["params"]):
                piece = nn.Parameter(local(param.detach()), requires_grad=param.requires_grad)
                param_group["params"][index] = piece
                if param in inner.state:
                    inner.state[piece] = {key: local(value) for key, value in inner.state.pop(param).items()}
                self.held.append((param, piece))

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients."""
        for param, piece in self.held:
            param.grad = piece.grad = None

    def apply(self, factor: float) -> None:
        """Step, and have the next forward gather what was stepped."""
        for param, piece in self.held:
            # Each time: FSDP may lay a shard out anew, at the first forward for one.
            piece.data = local(param.detach())
            piece.grad = None if param.grad is None else local(param.grad)
        super().apply(factor)
        for model in self._models:
            reshard(model)


class FSDP2Backend(PlainBackend):
    """Shards the repeated blocks that native finds, and the rest around them; stage 2 keeps them after forward."""

    name = "fsdp2"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Shard `model` in place. Collective."""
        precision = self.config.precision
        dtype = None if precision.dtype == "fp32" else DTYPES[precision.dtype]
        if self.group is None:
            # fully_shard needs a process group; one rank shards nothing.
            Through(model, Body(model, dtype))
            return super().prepare_model(model)
        start_alike(model, self.group)
        before = {name: param for name, param in model.named_parameters(remove_duplicate=False)}
        device = next(iter(before.values())).device.type if before else "cpu"
        mesh = DeviceMesh.from_group(self.group, device)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if precision.reduce_dtype == "fp32" else dtype
        )
        keep = self.config.strategy.zero_stage < 3
        shared = shared_params(model)
        for unit in partition(model):
            # A tied parameter belongs to one group only, which is the root's.
            if unit.modules and not any(id(param) in shared for block in unit.modules for param in block.parameters()):
                blocks = unit.modules if len(unit.modules) > 1 else unit.modules[0]
                fully_shard(blocks, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
        # The root's backward comes right after its forward: gathering it twice would buy nothing.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        for module in _sharded(model):
            if device == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no ReduceOp.AVG
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True, recurse=False)
        after = dict(model.named_parameters(remove_duplicate=False))
        self.replaced.update({id(param): (param, after[name]) for name, param in before.items()})
        if dtype is not None:
            apply_border_casts(model, dtype)
        return super().prepare_model(model)

    def make_optimizer(self, inner: torch.optim.Optimizer, sharded: bool) -> PlainOptimizer:
        """Return what steps `inner` on the shards."""
        if not sharded or self.group is None:
            return super().make_optimizer(inner, sharded)
        return FSDP2Optimizer(inner, self.group, self.models)

    def set_sync(self, sync: bool) -> None:
        """Let the coming backward reduce gradients, or keep them whole."""
        for model in self.models:
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(sync)
                model.set_is_last_backward(sync)

    def known(self, model: nn.Module) -> nn.Module:
        """Return `model` with its parameters sharded, as an evaluation may not have left them."""
        reshard(model)
        return super().known(model)

    @contextmanager
    def _whole(self, model: nn.Module, writeback: bool) -> Iterator[nn.Module]:
        blocks = _sharded(model)
        shards = dict(model.named_parameters())
        for module in blocks:
            # A forward inside must not take away what was asked for.
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield model
            if writeback:
                for name, param in model.named_parameters():
                    _write(shards[name], param.detach())
        finally:
            for module in blocks:
                stays = module is model or self.config.strategy.zero_stage < 3
                module.set_reshard_after_forward(not stays, recurse=False)
                module.reshard()

    def loaded(self, model: nn.Module) -> None:
        """Have the next forward gather what was loaded."""
        reshard(model)

    def free(self) -> None:
        """Forget all models, whose parameters stay sharded."""
        for model in self.models:
            restore_forward(model)
        super().free()


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters, where a forward without a backward left them."""
    for module in _sharded(model):
        module.reshard()


def _write(shard: torch.Tensor, whole: torch.Tensor) -> None:
    with torch.no_grad():
        if isinstance(shard, DTensor):
            cut = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
            shard.to_local().copy_(cut.to_local())
        elif shard is not whole:
            shard.copy_(whole)
