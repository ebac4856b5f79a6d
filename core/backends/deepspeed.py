"""DeepSpeed's engine under ours (`pip install "distui[deepspeed]"`): its ZeRO 0-3, our clipping and checkpoints.

DeepSpeed builds its engine from a model and its optimizer together, so a model is handed over when its optimizer is
prepared; until then, and without one, it is a plain model.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends import deepspeed_items as items
from distui.core.backends.base import Part
from distui.core.backends.forward import Body, Through, restore_forward
from distui.core.backends.plain import PlainBackend, PlainOptimizer
from distui.core.backends.plain_items import count_bytes
from distui.core.errors import UserError
from distui.core.ranks.precision import DTYPES, apply_border_casts
from distui.core.sharding.optim.prepared import PreparedOptimizer
from distui.core.sharding.transport.alike import start_alike

MAX_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's own default; it allocates the whole bucket, so a smaller model gets a smaller one."""


def import_deepspeed() -> Any:
    """Return the module `deepspeed`, quiet and for the device that there is.

    Raises: UserError where it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports' own
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(
                "strategy.backend='deepspeed', and DeepSpeed cannot be imported",
                f"{type(error).__name__}: {error}",
                'pip install "distui[deepspeed]", or set strategy.backend to native',
            ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls these in every step; only it can change that. For good: a filter belongs to the process.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


class DeepSpeedOptimizer(PlainOptimizer):
    """Steps through DeepSpeed's engine; gradients are where its stage keeps them."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        engine: Any,
        params: list[nn.Parameter],
        group: dist.ProcessGroup,
        stage: int,
    ) -> None:
        super().__init__(inner, group if stage else None)
        self.engine, self.stage, self._params = engine, stage, params

    def params(self) -> list[torch.Tensor]:
        """Return all parameters that it trains, each an object of the model."""
        return [*self._params]

    def gradients(self, place: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Return this rank's gradients."""
        return items.gradients(self.engine, self._params, self.stage)

    def place_of(self, params: Iterable[torch.Tensor]) -> list[torch.Tensor] | None:
        """Return None if all parameters are meant, an empty list if none.

        Raises: UserError for some of them.
        """
        place = super().place_of(params)
        if place:
            raise UserError(
                f"clipping {len(place)} of {len(self._params)} parameters under backend=deepspeed",
                "DeepSpeed keeps the gradients of all of them in common buffers",
                "clip model.parameters() as a whole, or set strategy.backend to native",
            )
        return place

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients."""
        items.discard_gradients(self.engine, self._params, self.stage)

    def apply(self, factor: float) -> None:
        """Step with the gradients times `factor`. Collective: all ranks."""
        if factor != 1.0 and (gradients := self.gradients(None)):
            torch._foreach_mul_(gradients, factor)
        self.engine.step()

    def skip(self) -> None:
        """Drop the gradients of a step that must not happen."""
        self.discard_gradients(set_to_none=True)


class DeepSpeedBackend(PlainBackend):
    """One DeepSpeed engine, of one model and its optimizer.

    bf16 is DeepSpeed's own at stages 2 and 3 (parameters in bf16, masters in fp32), and at stage 1 where gradients may
    be summed in bf16; otherwise autocast over fp32 parameters, with our loss scale under fp16.
    """

    name = "deepspeed"
    engine: Any = None
    _trained: nn.Module | None = None
    """The model that DeepSpeed holds."""

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.config.strategy.zero_stage

    @property
    def _own_bf16(self) -> bool:
        # At stage 1 DeepSpeed sums in fp32 by another optimizer class, which keeps whole fp32 gradients on every rank.
        precision = self.config.precision
        can = self.stage >= 2 or (self.stage == 1 and precision.reduce_dtype == "same")
        return can and precision.dtype == "bf16" and self.group is not None

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Send the forward of `model` through a body that DeepSpeed takes over with the optimizer. Collective."""
        dtype, own_bf16 = self.config.precision.dtype, self._own_bf16
        if self.group is not None:
            import_deepspeed()
            start_alike(model, self.group)
        Through(model, Body(model, None if dtype == "fp32" or own_bf16 else DTYPES[dtype]))
        if own_bf16:
            apply_border_casts(model.to(torch.bfloat16), torch.bfloat16)
        return super().prepare_model(model)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PreparedOptimizer:
        """Hand model and optimizer over to DeepSpeed. Collective."""
        if self.group is None:
            return super().prepare_optimizer(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        ids = {id(param) for param in params}
        models = [model for model in self.models if any(id(param) in ids for param in model.parameters())]
        if len(models) != 1 or self.engine is not None:
            raise UserError(
                "backend=deepspeed got more than one model or optimizer to train"
                if self.engine is not None or models
                else "the optimizer's parameters belong to no prepared model",
                f"{len(models)} of {len(self.models)} prepared models hold its {len(params)} parameters"
                + (", and another optimizer is prepared" if self.engine is not None else ""),
                "prepare one model and one optimizer, or set strategy.backend to native",
            )
        self._trained = model = models[0]
        body = model.__dict__["forward"].wrapper
        sizes = [len(group["params"]) for group in optimizer.param_groups]  # DeepSpeed puts its partitions there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = import_deepspeed().initialize(
                model=body, optimizer=optimizer, config=self._settings(model), dist_init_required=False
            )
        model.__dict__["forward"].wrapper = self.engine
        prepared = DeepSpeedOptimizer(optimizer, self.engine, params, self.group, self.stage)
        prepared.params_of_groups = sizes
        self.optimizers.append(prepared)
        return prepared

    def why_not_left_out(self, param: torch.Tensor) -> str:
        """Return why only a prepared optimizer may step `param`."""
        return "DeepSpeed's engine reduces gradients for its own optimizer" if self.group is not None else ""

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        numel = sum(param.numel() for param in model.parameters())
        precision = self.config.precision
        settings: dict[str, Any] = {
            # The engine above decides what a step is, and scales and clips; DeepSpeed would clip at 1.0 if not told.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": max(1, min(numel, MAX_BUCKET_NUMEL))},
        }
        if self._own_bf16:
            settings["bf16"] = {"enabled": True}
            if precision.reduce_dtype == "fp32":
                settings |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        return settings

    # ---- training ------------------------------------------------------------------------------------------------

    def set_sync(self, sync: bool) -> None:
        """Say whether the coming backward is the last; stages 2 and 3 reduce into their shards each time."""
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(sync)

    def backward(self, loss: torch.Tensor, factor: float, **kwargs: Any) -> None:
        """Compute gradients by DeepSpeed's engine. Collective."""
        if self.engine is None:
            super().backward(loss, factor, **kwargs)
            return
        unknown = {key: value for key, value in kwargs.items() if key != "retain_graph" and value}
        if unknown:
            raise UserError(
                f"engine.backward({', '.join(unknown)}) under backend=deepspeed",
                "DeepSpeed's backward takes retain_graph only",
                "leave it out, or set strategy.backend to native",
            )
        self.engine.backward(loss * factor, retain_graph=bool(kwargs.get("retain_graph")), scale_wrt_gas=False)

    # ---- whole weights -------------------------------------------------------------------------------------------

    def _holds(self, model: nn.Module) -> bool:
        return self.known(model) is self._trained and self.stage > 0

    @contextmanager
    def _whole(self, model: nn.Module, writeback: bool) -> Iterator[nn.Module]:
        if not self._holds(model):
            yield model
            return
        if self.stage < 3:
            yield model
        else:
            with import_deepspeed().zero.GatheredParameters(
                list(model.parameters()), modifier_rank=0 if writeback else None
            ):
                yield model
        if writeback:
            items.refresh_masters(self.engine.optimizer, self.stage)

    def full_state_dict(self, model: nn.Module, only_rank_0: bool) -> dict[str, Any]:
        """Return the model's whole state on the CPU, masters where there are such. Collective."""
        if not self._holds(model):
            return super().full_state_dict(model, only_rank_0)
        assert self.group is not None
        keep = not only_rank_0 or dist.get_rank(self.group) == 0
        held = items.model_items(model, self.engine.optimizer, self.stage, None)
        shapes = self.param_shapes(model)
        names = {id(param): name for name, param in nn.Module.named_parameters(model)}
        whole: dict[str, torch.Tensor] = {}
        for name, param in nn.Module.named_parameters(model):
            full = items.assemble(held[name], self.group, sharded=param.requires_grad or self.stage == 3)
            if keep:
                whole[name] = full.view(shapes[name]).cpu()
        state: dict[str, Any] = {}
        for name, value in model.state_dict(keep_vars=True).items() if keep else ():
            if id(value) in names:
                state[name] = whole[names[id(value)]]
            else:
                state[name] = value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        return state

    def load_full_state_dict(self, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
        """Take the model's whole state, each rank what it holds of it. Collective."""
        if not self._holds(model):
            return super().load_full_state_dict(model, state, strict)
        with self.full_parameters(model, writeback=False):
            result = model.load_state_dict(state, strict=strict)
        for name, item in items.model_items(model, self.engine.optimizer, self.stage, None).items():
            if name in state:
                end = item.start + item.local.numel()
                item.local.copy_(state[name].reshape(-1)[item.start : end])
        self.loaded(model)
        return result

    # ---- checkpoints and accounting ------------------------------------------------------------------------------

    def model_items(self, model: nn.Module, part: Part | None) -> dict[str, torch.Tensor]:
        """Return what this rank holds of parameters (masters) and buffers."""
        if not self._holds(model):
            return super().model_items(model, part)
        return {**items.model_items(model, self.engine.optimizer, self.stage, part)}

    def optimizer_items(self, optimizer: PreparedOptimizer, part: Part | None) -> dict[str, Any]:
        """Return what this rank holds of the optimizer's states."""
        if not isinstance(optimizer, DeepSpeedOptimizer) or not self.stage:
            return super().optimizer_items(optimizer, part)
        return items.optimizer_items(self.engine.optimizer, optimizer.params(), self._names(), self.stage)

    def allocate_states(self, optimizer: PreparedOptimizer, saved: Mapping[str, Any]) -> None:
        """Let the optimizer have exactly the states that the checkpoint has."""
        if not isinstance(optimizer, DeepSpeedOptimizer) or not self.stage:
            super().allocate_states(optimizer, saved)
        else:
            items.allocate_states(self.engine.optimizer, optimizer.params(), self._names(), self.stage, saved)

    def loaded(self, model: nn.Module) -> None:
        """Bring the masters that were loaded to all ranks. Collective."""
        if self._holds(model):
            items.publish(self.engine.optimizer, self.stage)

    def param_shapes(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the whole shape of every parameter by name."""
        return {
            name: list(getattr(param, "ds_shape", param.shape)) for name, param in nn.Module.named_parameters(model)
        }

    def memory_by_category(self) -> dict[str, int]:
        """Return bytes of this rank by category; DeepSpeed's own buckets are not among them."""
        if self.engine is None or not self.stage:
            return super().memory_by_category()
        return count_bytes(**items.tensors_by_category(self.engine, self.models, self.stage))

    def free(self) -> None:
        """Give the models their own forward back."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = self._trained = None
        for model in self.models:
            restore_forward(model)
        super().free()
