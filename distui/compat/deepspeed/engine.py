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
from distui.compat.deepspeed.loading import DeepSpeedDataLoader, note_batch
from distui.compat.deepspeed.monitor import Monitor
from distui.compat.deepspeed.queries import Queries
from distui.compat.deepspeed.saving import Saving
from distui.compat.not_offered import NotOffered
from distui.core.backends.optimizer import PreparedOptimizer
from distui.core.engine import Engine
from distui.core.errors import UserError

ENGINES: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()
"""Every engine that lives, for what is asked by parameter alone (`zero.GatheredParameters`)."""


class DeepSpeedEngine(Queries, Saving, nn.Module):
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
        self._num_bare = self._num_own = 0
        """Backward passes since the last step that the script, or this engine, ran."""
        self._step_applied = False
        self._norm: float | None = None
        self._losses: list[torch.Tensor] = []
        engine.register_for_checkpointing(self.progress())
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
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the coming forward and backward are the last before the step, against the count."""
        self._boundary = is_boundary

    def _set_sync(self) -> None:
        self.engine._set_sync(self.is_gradient_accumulation_boundary() and not self._inside_no_sync)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self._set_sync()
        self._finish_bare_backward()
        note_batch(self.engine, kwargs or list(inputs))
        output = self.module(*inputs, **kwargs)
        if torch.is_grad_enabled() and self.optimizer is not None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._on_output_gradient)
        return output

    def _on_output_gradient(self, grad: torch.Tensor) -> None:
        """Take part in a `loss.backward()` that the script calls itself, as DeepSpeed 0.19 does."""
        if self._in_backward or self._bare_backward:
            return
        if self.engine.scaler is not None and not self._scaled:
            raise UserError(
                "loss.backward() under fp16 without the loss scale",
                "small gradients would become 0",
                "call engine.backward(loss), or engine.scale(loss).backward()",
            )
        self._bare_backward = True
        self._num_bare += 1
        self.engine.backend.before_backward()

    def _finish_bare_backward(self) -> None:
        if self._bare_backward:
            self._bare_backward = self._scaled = False
            self.engine.backend.end_backward()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the loss scale, for a `loss.backward()` of the script's own."""
        self._need_optimizer("scale")
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
        self._in_backward = True
        try:
            self.engine.backward(loss if scale_wrt_gas else loss * steps, **kwargs)
        finally:
            self._in_backward = False
        self._num_own += 1
        if self.monitor.enabled:
            self._losses.append(loss.detach())
        return loss / steps if scale_wrt_gas else loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch and, on the last of a step, clip, step the optimizer and the schedule. Collective."""
        optimizer = self._need_optimizer("step")
        if self._inside_no_sync:
            raise AssertionError("It is illegal to call Engine.step() inside no_sync context manager")
        self._set_sync()
        self._finish_bare_backward()
        self._step_applied = False
        if self.is_gradient_accumulation_boundary():
            self._take_step(optimizer, lr_kwargs)
        self.micro_steps += 1

    def _take_step(self, optimizer: PreparedOptimizer, lr_kwargs: dict[str, Any] | None) -> None:
        engine = self.engine
        optimizer.finish_gradients()
        self._average_bare(optimizer)
        clipping = self.gradient_clipping()
        if clipping > 0 or self.zero_optimization() or engine.scaler is not None:
            norm = engine.clip_grad_norm_(self.module.parameters(), clipping or float("inf"))
            self._norm = norm.item() if norm is not None else None
        times_s = (engine.clock.forward_s, engine.clock.backward_s)
        optimizer.step()
        optimizer.zero_grad()
        self._step_applied = not optimizer.step_was_skipped
        if not self._step_applied:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self._report(times_s)

    def _average_bare(self, optimizer: PreparedOptimizer) -> None:
        """Divide by the accumulation steps what the script's own `loss.backward()` summed up."""
        steps, bare, own = self.gradient_accumulation_steps(), self._num_bare, self._num_own
        self._num_bare = self._num_own = 0
        if not bare or steps == 1:
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
        return self._norm

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
