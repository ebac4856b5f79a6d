"""distui's own engine: ZeRO 0-3 on flat buffers (`distui.core.sharding`)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.base import Backend, Part
from distui.core.backends.native_beside import NativeBeside
from distui.core.config.check import (
    expert_problems,
    offload_problems,
    pipeline_problems,
    tensor_problems,
)
from distui.core.config.schema import Config
from distui.core.config.shards import shard_problems
from distui.core.errors import ConfigError, UserError
from distui.core.ranks.precision import DTYPES, apply_border_casts
from distui.core.sharding.cuts import refuse_cut
from distui.core.sharding.homes.homes import Offload
from distui.core.sharding.optim.growth import can_grow
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.optim.prepared import PreparedOptimizer
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.start.weight_files import WeightFiles
from distui.core.sharding.transport.agreement import Place
from distui.core.sharding.transport.compression import Compression

if TYPE_CHECKING:  # pipelines and cut models are few; their files are read where there is one
    from distui.core.parallel.experts.exchange import Exchange
    from distui.core.parallel.pipelines.pipeline import Pipeline


class NativeBackend(NativeBeside, Backend):
    """One `ShardedModel` a model; an optimizer steps one of them."""

    name = "native"
    brings_models = True

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        super().__init__(config, group)
        self._models: dict[int, ShardedModel] = {}
        self._casts: list[Any] = []
        self._pipelines: dict[int, Pipeline] = {}
        self._exchanges: list[Exchange] = []

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Lay `model` out in flat buffers, in place, a unit at a time. Collective."""
        start, self.start = self.start, None
        if id(model) not in self._models:
            # A script that runs without `distui launch` has not been checked.
            problems = [*shard_problems(self.config), *offload_problems(self.config), *tensor_problems(self.config)]
            problems += [*pipeline_problems(self.config), *expert_problems(self.config)]
            if problems:
                raise ConfigError(problems)
            cuts, pipeline, exchange, strategy = None, None, None, self.config.strategy
            refuse_cut(model)
            if self.axes is not None:
                from distui.core.parallel.tensor import cut_model

                assert start is not None
                if self.axes.size("pp") > 1:  # stages are chosen by whole sizes
                    from distui.core.parallel.pipelines.pipeline import pipelined

                    pipeline = pipelined(model, self.axes, strategy, self.num_micro, self.loss_of, self.loss_factor)
                spreads = self.axes.size("ep") > 1
                if spreads:
                    from distui.core.parallel.experts.tokens import expert_names, spread_experts
                experts = expert_names(model) if spreads else ()
                along = strategy.sequence_parallel
                cuts = cut_model(model, self.axes, start, strategy.tensor_plan, self.plan, experts, along)
                if spreads:
                    cuts, exchange = spread_experts(model, self.axes, start, cuts)
                    self._exchanges.append(exchange)
                    if pipeline is not None:
                        pipeline.alongside = self.axes["stage"]
                if (group := self.axes["cp"]) is not None:
                    from distui.core.parallel.sequence import SequenceCut

                    sequence = SequenceCut(model, group, strategy.context_method, is_staged=pipeline is not None)
                    if pipeline is not None:
                        pipeline.own_forward = sequence.forward
                if pipeline is not None:
                    cuts = pipeline.stage.hold(self.axes, start, cuts)
                self.cuts = {**self.cuts, **(cuts.of if cuts is not None else {})}
            precision, home = self.config.precision, self.config.offload
            self._models[id(model)] = ShardedModel(
                model,
                stage=strategy.zero_stage,
                group=self.group,
                shares=None if self.axes is None else self.axes.shares,
                compute_dtype=None if precision.dtype == "fp32" else DTYPES[precision.dtype],
                reduce_in_fp32=precision.reduce_dtype == "fp32",
                offload=Offload(home.optimizer, home.params, home.nvme_path),
                compression=Compression.of(self.config.compression),
                zero_missing=self.config.optimizer.zero_missing_gradients,
                start=start,
                optimizer_of=self.optimizer_of,
                cuts=cuts,
            )
            if exchange is not None and (residence := self._models[id(model)].schedule.residence) is not None:
                exchange.before = functools.partial(residence.serve, Place.FORWARD_END)
            if pipeline is not None:
                self._pipelines[id(model)] = pipeline
                pipeline.before_micro = functools.partial(self._before_backward_of, self._models[id(model)])
                pipeline.begin(self._models[id(model)])
            if precision.dtype != "fp32":
                self._casts += apply_border_casts(model, DTYPES[precision.dtype])
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
        """Rebind `optimizer` to the flat shards of the model that holds its parameters. Collective."""
        given = {id(param) for group in optimizer.param_groups for param in group["params"]}
        held = [
            sharded
            for sharded in self._models.values()
            if any(id(param) in given for param in nn.Module.parameters(sharded.model))
        ]
        if len(held) > 1:  # of which one may be a module of another's, added to that and prepared later
            held = [each for each in held if any(id(param) in given for unit in each.units for param in unit.params)]
        if len(held) == 1:
            return held[0].prepare_optimizer(optimizer, self.config.optimizer.state_bits)
        if held:
            names = " and ".join(type(sharded.model).__name__ for sharded in held)
            raise UserError(
                f"one {type(optimizer).__name__} has parameters of {len(held)} prepared models, {names}",
                "each model's shards are stepped by optimizers of its own",
                "give each model an optimizer, or prepare one nn.ModuleList of both with this one",
            )
        raise UserError(
            "the optimizer's parameters belong to no prepared model",
            f"{len(self._models)} models are prepared, and none holds one of its {len(given)} parameters",
            "prepare a model before its optimizer, or both together: "
            "model, optimizer = engine.prepare(model, optimizer)",
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
            if id(sharded.model) not in self._pipelines:
                self._before_backward_of(sharded)

    def _before_backward_of(self, sharded: ShardedModel) -> None:
        sharded.schedule.hide_gradients()
        sharded.follow_requires_grad()
        sharded.schedule.weigh(self._weight)
        trained = [each for each in self._models.values() if each.schedule.order]
        if trained == [sharded]:
            # This backward is this model's, even where its loss reaches no parameter on this rank.
            sharded.schedule.open()

    def end_backward(self) -> None:
        """Reduce what is left of a backward. Collective."""
        for sharded in self._models.values():
            if (pipeline := self._pipelines.get(id(sharded.model))) is not None:
                pipeline.end_backward()
                continue
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

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Give whole gradients by name; changes are kept. Collective."""
        sharded = self.sharded(model)
        for optimizer in sharded.optimizers:
            optimizer.settle_factor()
        with sharded.gradients() as found:
            yield found

    def full_parameters(self, model: nn.Module, writeback: bool) -> AbstractContextManager[nn.Module]:
        """Give the model with whole, current parameters. Collective. Raises: UserError where axes cut them."""
        if (cuts := self.sharded(model).cuts) is not None:
            raise UserError(
                "full_parameters of a model that is cut over ranks",
                f"its modules compute with a part of its parameters, of which each of {cuts.num_ranks} ranks has one",
                "use engine.get_state_dict(model) and engine.load_state_dict(model, state), on all ranks",
            )
        return self.sharded(model).full_parameters(writeback)

    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state. Collective."""
        return self.sharded(model).full_state_dict(only_rank_0=only_rank_0)

    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state. Collective."""
        if isinstance(state, WeightFiles):
            self.sharded(model).load_files(state)
            return self.loaded(model)
        return self.sharded(model).load_full_state_dict(state, strict)

    def model_items(self, model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
        """Return what this rank holds of parameters and buffers. Collective."""
        from distui.core.backends import native_items

        return native_items.model_items(self.sharded(model), part)

    def optimizer_items(self, optimizer: PreparedOptimizer, part: Part | None) -> dict[str, Any]:
        """Return what this rank holds of the optimizer's states."""
        from distui.core.backends import native_items

        assert isinstance(optimizer, ShardedOptimizer)
        return native_items.optimizer_items(optimizer, part)

    def allocate_states(self, optimizer: PreparedOptimizer, saved: Mapping[str, Any]) -> None:
        """Let the optimizer have exactly the states that the checkpoint has."""
        from distui.core.backends import native_items

        assert isinstance(optimizer, ShardedOptimizer)
        native_items.allocate_states(optimizer, saved)

    def take_in(self, optimizer: PreparedOptimizer, names: Collection[str]) -> None:
        """Hold the parameters in `names` as unfrozen ones are, where the optimizer's states can grow. All ranks, alike.

        Else what the script unfreezes after the load would go on without its moments and its count of steps.
        """
        assert isinstance(optimizer, ShardedOptimizer)
        can = {id(param) for param in can_grow(optimizer)}
        for sharded in self._models.values():
            if any(optimizer is other for other in sharded.optimizers):
                sharded.follow_requires_grad(lambda name, param: name in names and id(param) in can)

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
        inside: list[Any] = [pipeline.messages for pipeline in self._pipelines.values()]
        inside += [exchange.transport for exchange in self._exchanges]
        for waited in (*inside, *(one for sharded in self._models.values() for one in sharded.transports)):
            seconds += waited.exposed_s
            waited.exposed_s = 0.0
        return seconds

    def free(self) -> None:
        """Take all hooks off the models and forget them. Collective."""
        for pipeline in self._pipelines.values():
            pipeline.remove()
        self._pipelines.clear()
        self._exchanges.clear()
        for sharded in self._models.values():
            sharded.remove()
        for cast in self._casts:
            cast.remove()
        self._casts.clear()
        self._models.clear()
        self.cuts = {}
