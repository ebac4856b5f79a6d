"""Models that keep plain tensors: each parameter whole on every rank, or a `DTensor` cut along its first dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distui.core.backends import plain_items
from distui.core.backends.base import Backend, Part
from distui.core.config.schema import Config
from distui.core.errors import UserError
from distui.core.sharding.optim.elementwise import why_not_elementwise
from distui.core.sharding.optim.prepared import PreparedOptimizer, prefer_fused
from distui.kernels.l2_norm import norm_reference


class PlainOptimizer(PreparedOptimizer):
    """Steps parameters by their own `grad`; `group` is where they are cut over, None where every rank has all."""

    def __init__(self, inner: torch.optim.Optimizer, group: dist.ProcessGroup | None) -> None:
        super().__init__(inner)
        self._group = group
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = [
            (param, param) for param_group in inner.param_groups for param in param_group["params"]
        ]
        """Parameters of the model, and what `inner` steps for each: the same, or this rank's piece of it."""
        for param_group in inner.param_groups:
            prefer_fused(param_group)

    def params(self) -> list[torch.Tensor]:
        """Return all parameters of the groups, each an object of the model."""
        return [param for param, _ in self.held]

    def gradients(self, place: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Return this rank's gradients of the parameters `place`; None: of all."""
        params = self.params() if place is None else place
        return [plain_items.local(param.grad) for param in params if param.grad is not None]

    def finish_gradients(self) -> None:
        """Do nothing: a backward ends when its gradients are reduced."""

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    def apply(self, factor: float) -> None:
        """Step with the gradients times `factor`."""
        if factor != 1.0 and (gradients := self.gradients(None)):
            torch._foreach_mul_(gradients, factor)
        self.inner.step()

    def grad_norm(self, place: list[torch.Tensor] | None, norm_type: float) -> torch.Tensor:
        """Return the norm of the gradients over all ranks, times `grad_factor`. Collective where they are cut."""
        gradients = self.gradients(place)
        if gradients:
            norms = torch.stack([norm_reference(grad, norm_type) for grad in gradients])
        else:
            params = self.params()
            norms = torch.zeros(1, device=params[0].device if params else None)
        infinite = math.isinf(norm_type)
        wide = norms.double() if norms.device.type == "cpu" else norms
        total = norms.max() if infinite else wide.pow(norm_type).sum()
        if self._group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=self._group)
        return (total if infinite else total.pow(1.0 / norm_type)).float() * abs(self.grad_factor)

    def scale_gradients(self, factor: float, place: list[torch.Tensor] | None) -> None:
        """Multiply gradients: all of them at the next step, in one pass with it, or some of them now."""
        if place is None:
            self.grad_factor *= factor
        elif gradients := self.gradients(place):
            torch._foreach_mul_(gradients, factor)

    def clamp_gradients(self, limit: float, place: list[torch.Tensor] | None = None) -> None:
        """Clamp every gradient element at `place` (None: all) to [-limit, limit]."""
        factor, self.grad_factor = self.grad_factor, 1.0
        for grad in self.gradients(None) if factor != 1.0 else ():
            grad.mul_(factor)
        for grad in self.gradients(place):
            grad.clamp_(-limit, limit)

    def place_of(self, params: Iterable[torch.Tensor]) -> list[torch.Tensor] | None:
        """Return those of `params` that are this optimizer's; None if they are all."""
        given = {id(param) for param in params}
        own = self.params()
        mine = [param for param in own if id(param) in given]
        return None if len(mine) == len(own) else mine


class PlainBackend(Backend):
    """What backends share whose models keep plain tensors; alone it is a script on one process."""

    name = "plain"

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        super().__init__(config, group)
        self.models: list[nn.Module] = []
        self.optimizers: list[PlainOptimizer] = []
        self.replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Keep `model` as it is."""
        self.models.append(model)
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """Let `optimizer` step the parameters that stand in the place of those it was built with."""
        held = {id(param) for model in self.models for param in model.parameters()}
        sharded = False
        reason = why_not_elementwise(optimizer)
        for group in optimizer.param_groups:
            for index, param in enumerate(group["params"]):
                new = self.replaced.get(id(param), (param, param))[1]
                if id(new) not in held:
                    raise UserError(
                        "the optimizer's parameters belong to no prepared model",
                        f"{len(self.models)} models are prepared, and none holds a tensor of shape "
                        f"{tuple(param.shape)} in one of its groups",
                        "prepare them together: model, optimizer = engine.prepare(model, optimizer)",
                    )
                sharded = sharded or isinstance(new, DTensor)
                if new is not param:
                    group["params"][index] = new
                    if param in optimizer.state:
                        optimizer.state[new] = _like(new, optimizer.state.pop(param))
        if reason and (sharded or "closure" in reason):
            raise UserError(
                f"the optimizer {type(optimizer).__name__} cannot step sharded parameters",
                reason,
                "use strategy.backend=ddp, or an element-wise optimizer such as torch.optim.AdamW(fused=True)",
            )
        prepared = self.make_optimizer(optimizer, sharded)
        self.optimizers.append(prepared)
        return prepared

    def make_optimizer(self, inner: torch.optim.Optimizer, sharded: bool) -> PlainOptimizer:
        """Return what steps `inner`, whose parameters may be `sharded` over the ranks."""
        return PlainOptimizer(inner, self.group if sharded else None)

    def set_sync(self, sync: bool) -> None:
        """Do nothing: there is nobody to send gradients to."""

    def clip_grad_norm_(self, params: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Clip by the global norm over all ranks, and return the norm before. Collective."""
        wanted = list(params)
        places = [(optimizer, optimizer.place_of(wanted)) for optimizer in self.optimizers]
        places = [(optimizer, place) for optimizer, place in places if place is None or place]
        if not places:
            raise UserError(
                "clip_grad_norm_ got no parameter of a prepared model with an optimizer",
                f"{len(wanted)} parameters were given",
                "prepare model and optimizer together, and pass model.parameters()",
            )
        norms = [optimizer.grad_norm(place, norm_type) for optimizer, place in places]
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        norm = total.item()
        if norm > max_norm or norm != norm:
            for optimizer, place in places:
                optimizer.scale_gradients(max_norm / (norm + 1e-6), place)
        return total

    @contextmanager
    def _whole(self, model: nn.Module, writeback: bool) -> Iterator[nn.Module]:
        yield model

    def full_parameters(self, model: nn.Module, writeback: bool) -> AbstractContextManager[nn.Module]:
        """Give the model with whole, current parameters. Collective."""
        return self._whole(self.known(model), writeback)

    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state on the CPU; tied names share one tensor, as in the model. Collective."""
        keep = not only_rank_0 or self.group is None or dist.get_rank(self.group) == 0
        state = {}
        wholes: dict[int, Any] = {}
        for name, value in self.known(model).state_dict(keep_vars=True).items():
            if id(value) not in wholes:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                wholes[id(value)] = whole.detach().cpu().clone() if keep and isinstance(whole, torch.Tensor) else whole
            if keep:
                state[name] = wholes[id(value)]
        return state

    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state, each rank what it holds of it. Collective."""
        params = dict(self.known(model).named_parameters(remove_duplicate=False))
        own = {name: _cut(params[name], value) if name in params else value for name, value in state.items()}
        return model.load_state_dict(own, strict=strict)

    def known(self, model: nn.Module) -> nn.Module:
        """Return `model`. Raises: UserError where it is not prepared."""
        if not any(model is known for known in self.models):
            raise UserError(
                f"the model {type(model).__name__} is not prepared",
                "the engine knows only models that went through engine.prepare",
                "call model = engine.prepare(model) first",
            )
        return model

    # ---- checkpoints and accounting ------------------------------------------------------------------------------

    def _names(self) -> dict[int, str]:
        return {id(param): name for model in self.models for name, param in model.named_parameters()}

    def model_items(self, model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
        """Return what this rank holds of parameters and buffers."""
        return plain_items.model_items(self.known(model), part)

    def optimizer_items(self, optimizer: PreparedOptimizer, part: Part | None) -> dict[str, Any]:
        """Return what this rank holds of the optimizer's states."""
        assert isinstance(optimizer, PlainOptimizer)
        return plain_items.optimizer_items(optimizer.held, optimizer.state, self._names(), part)

    def allocate_states(self, optimizer: PreparedOptimizer, saved: Mapping[str, Any]) -> None:
        """Let the optimizer have exactly the states that the checkpoint has."""
        assert isinstance(optimizer, PlainOptimizer)
        plain_items.allocate_states(optimizer.held, optimizer.state, self._names(), saved)

    def loaded(self, model: nn.Module) -> None:
        """Do nothing: the parameters themselves were written."""

    def memory_by_category(self) -> dict[str, int]:
        """Return bytes of this rank by category; what a backend's own collectives hold is not among them."""
        params = [param for model in self.models for param in model.parameters()]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return plain_items.count_bytes(
            parameters=params,
            gradients=[param.grad for param in params],
            optimizer_states=[value for state in states for value in state.values()],
            buffers=[buffer for model in self.models for buffer in model.buffers()],
        )

    def free(self) -> None:
        """Forget all models and optimizers."""
        self.models.clear()
        self.optimizers.clear()
        self.replaced.clear()


def _cut(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(param, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def _like(param: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Return the states of a parameter for what stands in its place."""
    return {
        key: _cut(param, value) if isinstance(value, torch.Tensor) and value.shape == param.shape else value
        for key, value in state.items()
    }
