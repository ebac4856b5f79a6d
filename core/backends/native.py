"""distui's own engine: ZeRO 0-3 on flat buffers (`distui.core.sharding`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.base import Backend, Part
from distui.core.backends.optimizer import PreparedOptimizer
from distui.core.config import Config
from distui.core.config_check import offload_problems
from distui.core.errors import ConfigError, UserError
from distui.core.offload.homes import Offload
from distui.core.precision import DTYPES, apply_border_casts
from distui.core.sharding.compression import Compression
from distui.core.sharding.optim import ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel


class NativeBackend(Backend):
    """One `ShardedModel` a model; an optimizer steps one of them."""

    name = "native"

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        super().__init__(config, group)
        self._models: dict[int, ShardedModel] = {}
        self._casts: list[Any] = []

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Lay `model` out in flat buffers, in place. Collective."""
        if id(model) not in self._models:
            # A script that runs without `distui launch` has not been checked.
            if problems := list(offload_problems(self.config)):
                raise ConfigError(problems)
            precision, home = self.config.precision, self.config.offload
            self._models[id(model)] = ShardedModel(
                model,
                stage=self.config.strategy.zero_stage,
                group=self.group,
                compute_dtype=None if precision.dtype == "fp32" else DTYPES[precision.dtype],
                reduce_in_fp32=precision.reduce_dtype == "fp32",
                offload=Offload(home.optimizer, home.params, home.nvme_path),
                compression=Compression.of(self.config.compression),
            )
            if precision.dtype != "fp32":
                self._casts += apply_border_casts(model, DTYPES[precision.dtype])
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
        """Rebind `optimizer` to the flat shards of the model that holds its parameters. Collective."""
        first = next((param for group in optimizer.param_groups for param in group["params"]), None)
        for sharded in self._models.values():
            if any(param is first for param in sharded.model.parameters()):
                return sharded.prepare_optimizer(optimizer, self.config.optimizer.state_bits)
        raise UserError(
            "the optimizer's parameters belong to no prepared model",
            f"{len(self._models)} models are prepared, and none holds the optimizer's first parameter",
            "prepare them together: model, optimizer = engine.prepare(model, optimizer)",
        )

    def sharded(self, model: nn.Module) -> ShardedModel:
        """Return the sharding of a prepared `model`."""
        try:
            return self._models[id(model)]
        except KeyError:
            raise UserError(
                f"the model {type(model).__name__} is not prepared",
                "the engine knows only models that went through engine.prepare",
                "call model = engine.prepare(model) first",
            ) from None

    @property
    def optimizers(self) -> list[ShardedOptimizer]:
        """All prepared optimizers."""
        return [optimizer for sharded in self._models.values() for optimizer in sharded.optimizers]

    def set_sync(self, sync: bool) -> None:
        """Say whether the coming backward is the last before the step."""
        for sharded in self._models.values():
            sharded.schedule.sync = sync

    def before_backward(self) -> None:
        """Take the gradients that plain code may see back from the parameters."""
        for sharded in self._models.values():
            sharded.schedule.hide_gradients()

    def end_backward(self) -> None:
        """Reduce what is left of a backward. Collective."""
        for sharded in self._models.values():
            sharded.schedule.end_backward()
            if sharded.schedule.sync:
                sharded.schedule.show_gradients()

    def clip_grad_norm_(self, params: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Clip by the global norm over all ranks, and return the norm before. Collective.

        The factor is applied with the step where all of an optimizer's parameters are meant, else at once.
        """
        wanted = list(params)
        norms, places = [], []
        for sharded in self._models.values():
            held = {id(param) for param in sharded.model.parameters()}
            mine = [param for param in wanted if id(param) in held]
            if mine and sharded.optimizers:
                optimizer = sharded.optimizers[0]
                place = optimizer.place_of(mine)
                norms.append(optimizer.grad_norm(place, norm_type))
                places.append((sharded, place))
        if not norms:
            raise UserError(
                "clip_grad_norm_ got no parameter of a prepared model with an optimizer",
                f"{len(wanted)} parameters were given",
                "prepare model and optimizer together, and pass model.parameters()",
            )
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        norm = total.item()
        if norm > max_norm or norm != norm:
            for sharded, place in places:
                for index, optimizer in enumerate(sharded.optimizers):
                    if place is None or index == 0:
                        optimizer.scale_gradients(max_norm / (norm + 1e-6), place)
        return total

    def full_parameters(self, model: nn.Module, writeback: bool) -> AbstractContextManager[nn.Module]:
        """Give the model with whole, current parameters. Collective."""
        return self.sharded(model).full_parameters(writeback)

    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state. Collective."""
        return self.sharded(model).full_state_dict(only_rank_0=only_rank_0)

    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state. Collective."""
        return self.sharded(model).load_full_state_dict(state, strict)

    def model_items(self, model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
        """Return what this rank holds of parameters and buffers. Collective."""
        from distui.core.backends import native_items

        sharded = self.sharded(model)
        sharded.schedule.finish_gathers()
        return native_items.model_items(sharded, part)

    def optimizer_items(self, optimizer: PreparedOptimizer, part: Part | None) -> dict[str, torch.Tensor]:
        """Return what this rank holds of the optimizer's states."""
        from distui.core.backends import native_items

        assert isinstance(optimizer, ShardedOptimizer)
        return native_items.optimizer_items(optimizer, part)

    def allocate_states(self, optimizer: PreparedOptimizer, saved: Mapping[str, Any]) -> None:
        """Make room for states that the checkpoint has."""
        from distui.core.backends import native_items

        assert isinstance(optimizer, ShardedOptimizer)
        native_items.allocate_states(optimizer, saved)

    def loaded(self, model: nn.Module) -> None:
        """Bring what was loaded into shards and masters to all ranks. Collective."""
        from distui.core.backends import native_items

        native_items.loaded(self.sharded(model))

    def memory_by_category(self) -> dict[str, int]:
        """Return bytes of this rank by category."""
        total: dict[str, int] = {}
        for sharded in self._models.values():
            for category, nbytes in sharded.memory_by_category().items():
                total[category] = total.get(category, 0) + nbytes
        return total

    def take_exposed_s(self) -> float:
        """Return the seconds that this rank was blocked in collectives since the last call."""
        seconds = 0.0
        for sharded in self._models.values():
            for transport in sharded.transports:
                seconds += transport.exposed_s
                transport.exposed_s = 0.0
        return seconds

    def free(self) -> None:
        """Take all hooks off the models and forget them. Collective."""
        for sharded in self._models.values():
            sharded.remove()
        for cast in self._casts:
            cast.remove()
        self._casts.clear()
        self._models.clear()
