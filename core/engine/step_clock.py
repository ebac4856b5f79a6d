"""Where the time of an optimizer step goes, and what the step was, for telemetry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distui.core.axes.cut import part_of
from distui.core.model.flops import FlopMeter
from distui.core.ranks import streams
from distui.core.sharding.hooks import Hook
from distui.core.sharding.residence import in_backward
from distui.core.telemetry.source import NullSource, TelemetrySource


class StepClock:
    """Adds up the parts of a step as the training thread passes through them, and sends the step at its end.

    All times are the host's. On CUDA kernels run behind the host, so a part is when its kernels were launched; only
    the whole step, which waits for the loss scale or the clipping norm, is the device's.
    """

    def __init__(
        self,
        telemetry: TelemetrySource | NullSource,
        exposed_s: Callable[[], float],
        flops: FlopMeter,
        share_of_batch: tuple[int, int] = (0, 1),
    ) -> None:
        """`share_of_batch` is which of how many ranks that share a batch this is: each tells its part of the tokens."""
        self.telemetry, self.flops = telemetry, flops
        self._exposed_s = exposed_s
        """Returns the seconds blocked in collectives since it was last asked."""
        self.step = 0
        self.before_training: Callable[[], None] = lambda: None
        """Called before each forward of a training step."""
        self._begin = 0.0
        self._forward_begin = 0.0
        self._handed = (0, 0)
        self._share_of_batch = share_of_batch
        self._reset()

    def _reset(self) -> None:
        self.data_wait_s = self.forward_s = self.backward_s = self.optimizer_s = self.exposed_comm_s = 0.0
        self.tokens = self.samples = self.micro_batches = 0
        self._losses: list[Callable[[], float]] = []
        self.grad_norm: Callable[[], float] | None = None

    def watch(self, model: nn.Module) -> list[Any]:
        """Time the forward passes of `model`; returns the hooks' handles."""
        self.flops.watch(model)
        return [
            model.register_forward_pre_hook(Hook(self._before_forward), prepend=True),
            model.register_forward_hook(Hook(self._after_forward)),
        ]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if in_backward():
            return
        if module.training and torch.is_grad_enabled():
            self.before_training()
        now = time.perf_counter()
        if not self._begin:
            self._begin = now
        self._forward_begin = now
        self.telemetry.phase("forward" if module.training else "evaluation")

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        exposed = self._exposed_s()
        self.exposed_comm_s += exposed
        self.forward_s += time.perf_counter() - self._forward_begin - exposed

    def data_wait(self, seconds: float) -> None:
        """Account `seconds` that the script waited for its next batch."""
        if not self._begin:
            self._begin = time.perf_counter() - seconds
        self.data_wait_s += seconds
        self.telemetry.phase("data")

    def batch(self, tokens: int, samples: int) -> None:
        """Note what the script was handed; it counts once a backward follows (an evaluation's batches do not)."""
        if self._share_of_batch[1] > 1:
            index, num_ranks = self._share_of_batch
            tokens, samples = (high - low for low, high in (part_of(n, num_ranks, index) for n in (tokens, samples)))
        self._handed = (tokens, samples)

    def backward(self, begin: float, loss: torch.Tensor) -> None:
        """Account a backward that began at `begin` (perf_counter) and is over."""
        exposed = self._exposed_s()
        self.exposed_comm_s += exposed
        self.backward_s += time.perf_counter() - begin - exposed
        self.micro_batches += 1
        self.tokens += self._handed[0]
        self.samples += self._handed[1]
        self._handed = (0, 0)
        self.flops.end_backward(self.tokens, self.samples)
        if loss.numel() == 1:
            self._losses.append(streams.reader(loss.detach()))

    def scale_last_loss(self, factor: float) -> None:
        """Multiply the loss of the last backward, which was divided before."""
        if self._losses:
            read = self._losses[-1]
            self._losses[-1] = lambda: read() * factor

    def end_step(self, begin: float, learning_rate: float | None, loss_scale: float | None, skipped: bool) -> None:
        """Account the optimizer's step that began at `begin`, and send the whole step."""
        exposed = self._exposed_s()
        now = time.perf_counter()
        self.exposed_comm_s += exposed
        self.optimizer_s += now - begin - exposed
        self.step += 1
        losses = self._losses

        def loss() -> float | None:
            # Evaluated on the side thread: reading a device's number would stall the training thread.
            return sum(value() for value in losses) / len(losses) if losses else None

        self.telemetry.step(
            step=self.step,
            step_s=now - self._begin if self._begin else 0.0,
            data_wait_s=self.data_wait_s,
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            exposed_comm_s=self.exposed_comm_s,
            optimizer_s=self.optimizer_s,
            tokens=self.tokens,
            samples=self.samples,
            loss=loss,
            grad_norm=self.grad_norm,
            learning_rate=learning_rate,
            loss_scale=loss_scale,
            flops=self.flops.end_step(self.step, self.tokens, self.samples, self.micro_batches),
            micro_batches=self.micro_batches,
            skipped=skipped,
        )
        self._reset()
        self._begin = now
        self.telemetry.phase("idle")
