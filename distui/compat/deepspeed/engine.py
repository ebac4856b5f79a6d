"""`DeepSpeedEngine` on distui's engine: forward, backward, step, and the counters that scripts read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distui.compat.deepspeed.configuration import DeepSpeedConfig
from distui.compat.deepspeed.curricula import Curricula
from distui.compat.deepspeed.loading import DeepSpeedDataLoader, note_batch
from distui.compat.deepspeed.monitor import Monitor
from distui.compat.deepspeed.queries import Queries
from distui.compat.deepspeed.saving import Saving
from distui.compat.not_offered import NotOffered
from distui.core.engine.engine import Engine
from distui.core.errors import UserError
from distui.core.sharding.optim.prepared import PreparedOptimizer

ENGINES: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()
"""Every engine that lives, for what is asked by parameter alone (`zero.GatheredParameters`)."""


class LossScaleMissing(UserError, RuntimeError):
    """A `loss.backward()` under fp16 that nobody scaled."""


class DeepSpeedEngine(Queries, Curricula, Saving, nn.Module):
    """A model, its optimizer and its schedule under DeepSpeed's names; `engine` is the `distui.Engine` below."""

    def __init__(
        self,
        settings: DeepSpeedConfig,
        engine: Engine,
        model: nn.Module,
        optimizer: PreparedOptimizer | None,
        lr_scheduler: Any,
        collate_fn: Any = None,
    ) -> None:
        """`model` and `optimizer` are prepared by `engine`; `deepspeed.initialize` builds all of it."""
        nn.Module.__init__(self)
        self.settings, self.engine = settings, engine
        self.module = model
        self.optimizer = optimizer
        self.client_optimizer = optimizer.inner if optimizer is not None else None
        self.basic_optimizer = self.client_optimizer
        self.lr_scheduler = lr_scheduler
        self.collate_fn = collate_fn
        self.training_dataloader: DeepSpeedDataLoader | None = None
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.loaded_checkpoint_tag: str | None = None
        self.monitor = Monitor(engine, settings)
        self._boundary: bool | None = None
        self._inside_no_sync = False
        self._in_backward = False
        self._bare_backward = self._scaled = False
        self._num_bare = self._num_own = self._num_backward = 0
        """Backward passes since the last step that the script, or this engine, ran; the last is DeepSpeed's count."""
        self._in_step = False
        self._step_applied = False
        self._norm: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []
        self._begin_curricula()
        engine.register_for_checkpointing(self.progress())
        engine.backend.weigh(self._bare_factor)
        ENGINES.add(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and name != "module":
                return getattr(module, name)
            raise

    # ---- parameters ----------------------------------------------------------------------------------------------

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the module's parameters under `module.`; weights in flight are waited for."""
        next(iter(self.module.named_parameters()), None)
        return nn.Module.named_parameters(self, *args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.module.zero_grad(set_to_none)

    # ---- a training step -----------------------------------------------------------------------------------------

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the current micro-batch is the last before the optimizer steps."""
        if not self.managed_gradient_accumulation():
            return self._in_step
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the coming forward and backward are the last before the step, against the count."""
        if not self.managed_gradient_accumulation():
            raise AssertionError("managed_gradient_accumulation is false: every step() is the boundary")
        self._boundary = is_boundary

    def _set_sync(self) -> None:
        self.engine._set_sync(self.is_gradient_accumulation_boundary() and not self._inside_no_sync)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self._set_sync()
        self._finish_bare_backward()
        self.engine.backend.weigh(self._bare_factor)  # the script may have changed the accumulation steps
        if self.module.training:
            kwargs |= self._advance_curricula()
        note_batch(self.engine, kwargs or list(inputs))
        output = self.module(*inputs, **kwargs)
        if torch.is_grad_enabled() and self.optimizer is not None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._on_output_gradient)
        return output

    def _on_output_gradient(self, grad: torch.Tensor) -> None:
        """Take part in a backward that the script or another engine runs, as DeepSpeed 0.19 does."""
        if self._in_backward or self._bare_backward:
            return
        other = next((engine for engine in list(ENGINES) if engine._in_backward), None)
        self._need_scaled(other)
        self._bare_backward = True
        self._num_bare += 1
        if self.engine.backend.weighs:
            # Another engine's backward has divided the loss by its own micro-batches.
            self.engine.backend.weigh(self._sum_factor if other is not None else self._bare_factor)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_bare_backward)
        elif other is not None and self.gradient_accumulation_steps() > 1:
            raise UserError(
                "one backward for two engines that accumulate gradients",
                f"strategy.backend={self.engine.backend.name} cannot tell whose loss was divided by the micro-batches",
                "set strategy.backend to native",
            )
        self.engine.backend.before_backward()

    def _need_scaled(self, other: DeepSpeedEngine | None) -> None:
        own = self.engine.scaler
        if other is not None:
            scales = [engine.engine.scaler.scale if engine.engine.scaler else 1.0 for engine in (self, other)]
            if scales[0] != scales[1]:
                raise UserError(
                    "one backward for two engines with different loss scales",
                    f"the loss was multiplied by {scales[1]:g}, and this engine divides by {scales[0]:g}",
                    "call backward on each engine with a loss of its own, or use bf16",
                )
        elif own is not None and not self._scaled:
            raise LossScaleMissing(
                "Loss scaling is required: loss.backward() under fp16 without the loss scale",
                "small gradients would become 0",
                "call engine.backward(loss), or engine.scale(loss).backward()",
            )

    @property
    def _sum_factor(self) -> float:
        """What turns the mean over the ranks into what the JSON asks for."""
        return float(self.dp_world_size) if self.settings.sums_gradients else 1.0

    @property
    def _bare_factor(self) -> float:
        """What gradients of the script's own `loss.backward()` are multiplied by as they arrive."""
        return self._sum_factor / self.gradient_accumulation_steps() if self.engine.backend.weighs else self._sum_factor

    def _finish_bare_backward(self) -> None:
        if self._bare_backward:
            self._bare_backward = self._scaled = False
            self.engine.backend.end_backward()
            self.engine.backend.weigh(self._bare_factor)

    def scale(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """Return the loss times the loss scale, for a `loss.backward()` of the script's own.

        A retained graph needs no word here. Raises: AssertionError for what is not one number.
        """
        self._need_optimizer("scale")
        if loss.numel() != 1:
            raise AssertionError(f"loss must be a scalar tensor, got shape {tuple(loss.shape)}")
        self._scaled = True
        return loss * self.engine.scaler.scale if self.engine.scaler is not None else loss

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Compute gradients of the loss over the accumulation steps, and return it divided by them. Collective.

        May be called several times before a step, once a loss.
        """
        self._need_optimizer("backward")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise UserError(
                "engine.backward needs one number", f"the loss is {shape}", "reduce it: engine.backward(loss.mean())"
            )
        self._set_sync()
        self._finish_bare_backward()
        steps = self.gradient_accumulation_steps()
        kwargs = {"retain_graph": True} if retain_graph else {}
        self.engine.backend.weigh(self._sum_factor)
        self._in_backward = True
        try:
            self.engine.backward(loss, micro_batches=steps if scale_wrt_gas else 1, **kwargs)
        finally:
            self._in_backward = False
            self.engine.backend.weigh(self._bare_factor)
        self._num_own += 1
        self._num_backward += 1
        if self.monitor.enabled:
            self._losses.append(loss.detach())
        return loss / steps if scale_wrt_gas else loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch and, on the last of a step, clip, step the optimizer and the schedule. Collective."""
        optimizer = self._need_optimizer("step")
        if self._inside_no_sync:
            raise AssertionError("It is illegal to call Engine.step() inside no_sync context manager")
        self._finish_bare_backward()
        self._in_step = True
        self._set_sync()
        self._step_applied = False
        try:
            if not self.managed_gradient_accumulation():
                self.engine.backend.reduce_kept()
            if self.is_gradient_accumulation_boundary():
                self._take_step(optimizer, lr_kwargs)
        finally:
            self._in_step = False
        self.micro_steps += 1

    def _take_step(self, optimizer: PreparedOptimizer, lr_kwargs: dict[str, Any] | None) -> None:
        engine = self.engine
        optimizer.finish_gradients()
        self._average_bare(optimizer)
        clipping = self.gradient_clipping()
        if clipping > 0 or self.zero_optimization() or engine.scaler is not None:
            # Under ZeRO the norm is of what the optimizer steps.
            stepped = [param for group in optimizer.param_groups for param in group["params"]]
            params = stepped if self.zero_optimization() else self.module.parameters()
            norm = engine.clip_grad_norm_(params, clipping or float("inf"))
            self._norm = norm
            if norm is not None and self.zero_optimization() and self.settings.skips_overflows:
                optimizer.skip_next = not bool(torch.isfinite(norm))
        times_s = (engine.clock.forward_s, engine.clock.backward_s)
        optimizer.step()
        optimizer.zero_grad()
        self.module.zero_grad()  # also of what no optimizer has
        self._step_applied = not optimizer.step_was_skipped
        if not self._step_applied:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        self.global_samples += self.train_batch_size() if self.managed_gradient_accumulation() else self._seen_samples()
        self._report(times_s)

    def _seen_samples(self) -> int:
        seen, self._num_backward = self._num_backward, 0
        return self.train_micro_batch_size_per_gpu() * self.dp_world_size * seen

    def _average_bare(self, optimizer: PreparedOptimizer) -> None:
        """Divide by the accumulation steps what the script's own `loss.backward()` summed up, if nobody has yet."""
        steps, bare, own = self.gradient_accumulation_steps(), self._num_bare, self._num_own
        self._num_bare = self._num_own = 0
        if not bare or steps == 1 or self.engine.backend.weighs:
            return
        if own:
            raise UserError(
                "loss.backward() and engine.backward(loss) in one step",
                f"{bare} and {own} of them: only the latter divides by the {steps} accumulation steps",
                "use one of the two",
            )
        optimizer.scale_gradients(1.0 / steps, None)

    def _report(self, times_s: tuple[float, float]) -> None:
        every = self.steps_per_print()
        if every and self.global_steps % every == 0:
            self.engine.print(
                f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}, mom={self.get_mom()}"
            )
        if self.wall_clock_breakdown():
            forward_s, backward_s = times_s
            self.engine.print(f"time (ms) | fwd: {forward_s * 1e3:.2f} | bwd: {backward_s * 1e3:.2f}")
        if self.monitor.enabled:
            losses, self._losses = self._losses, []
            self.monitor.step(losses, self.get_lr(), self.global_samples)

    def _need_optimizer(self, what: str) -> PreparedOptimizer:
        if self.optimizer is None:
            raise UserError(
                f"engine.{what} needs an optimizer",
                "neither deepspeed.initialize nor the JSON named one",
                'pass optimizer=..., or add "optimizer": {"type": "AdamW", "params": {"lr": ...}} to the JSON',
            )
        return self.optimizer

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of the backward passes inside local; works at every stage, unlike DeepSpeed's."""
        if self._inside_no_sync:
            raise AssertionError("no_sync context manager reentry is unsupported")
        self._inside_no_sync = True
        try:
            with self.engine.no_sync():
                yield
        finally:
            self._inside_no_sync = False

    def coalesce_grad_reduction(self) -> None:
        """Refused: what it saves, accumulation saves already."""
        raise NotOffered(
            "DeepSpeedEngine.coalesce_grad_reduction is not offered by distui",
            "a step that is not the boundary sends nothing at stages 0 and 1 as it is",
            "call set_gradient_accumulation_boundary(False) before all backward passes but the last",
        )

    def was_step_applied(self) -> bool:
        """Return whether the last `step()` changed the weights."""
        return self._step_applied

    def get_global_grad_norm(self) -> float | None:
        """Return the norm of the last step's gradients, before clipping."""
        return self._norm.item() if self._norm is not None else None

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        """Put the module into training mode."""
        self.training = mode
        self.module.train(mode)
        return self

    def eval(self) -> DeepSpeedEngine:
        """Put the module into evaluation mode."""
        return self.train(False)

    # ---- around it -----------------------------------------------------------------------------------------------

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """Return a loader that gives this rank its micro-batches of `dataset`."""
        return DeepSpeedDataLoader(
            self.engine,
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            collate_fn=collate_fn if collate_fn is not None else self.collate_fn,
            data_sampler=data_sampler,
            num_workers=num_local_io_workers,
            drop_last=bool(self.settings.get("dataloader_drop_last", False)),
            pin_memory=pin_memory,
            shuffle=route == "train",
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module's forward with torch.compile; DeepSpeed's own passes are not there."""
        for option in ("schedule", "compiled_autograd_enabled"):
            kwargs.pop(option, None)
        self.module.compile(*args, **kwargs.pop("compile_kwargs", {}), **kwargs)

    def empty_partition_cache(self) -> None:
        """Let go of cached memory; parameters live in a ring of buffers of fixed size, which stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def destroy(self) -> None:
        """Finish trackers and saves in flight, and forget the model. Collective. The process group stays."""
        self.engine.saver.wait()
        self.monitor.close()
        self.engine.free_memory()
        ENGINES.discard(self)
